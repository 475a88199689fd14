"""Folders for vLLM: bitsandbytes reads the base, PEFT the adapter, and both are what was trained.

vLLM needs a GPU. Its loader of such folders takes each weight's statistics by bitsandbytes' QuantState.from_dict, as
the test here does, and expects packed weights as uint8 (n, 1).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from export import zoo
from safetensors.torch import load_file
from tiny_models import difference, save_dense, stir
from transformers import AutoTokenizer

from qlora.adapters.lora import save_base_facts, save_lora
from qlora.export.vllm import export_vllm
from qlora.models.loading import load_for_inference, load_quantized

BFLOAT16 = 16 * 2.0**-9  # of logits: half a unit of its 8 bits, about five roundings in each of three layers


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    zoo.save("llama", folder / "model")
    zoo.save_adapter(folder / "model", folder / "adapter")
    return folder


def test_bitsandbytes_reads_the_base_bit_for_bit(llama, tmp_path):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    export_vllm(llama / "model", llama / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed = [name.rpartition(".quant_state.")[0] for name in tensors if ".quant_state.bitsandbytes__nf4" in name]
    model, _ = load_quantized(llama / "model", torch.bfloat16, block_size=32, progress=False)
    assert len(packed) == 21
    for name in packed:
        statistics = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        state = QuantState.from_dict(statistics, device="cpu")
        assert state.blocksize == 32
        assert tensors[name].dtype == torch.uint8
        assert tensors[name].shape == (state.shape.numel() // 2, 1)
        ours = model.get_submodule(name.removesuffix(".weight")).dequantize(torch.float32)
        assert torch.equal(dequantize_4bit(tensors[name], state), ours.to(state.dtype))
    rest = {name: value.dtype for name, value in tensors.items() if not any(name.startswith(p) for p in packed)}
    assert set(rest.values()) == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert config["load_in_4bit"]
    assert config["bnb_4bit_quant_storage"] == "uint8"  # the only one that vLLM takes


def test_transformers_and_peft_without_qlora_compute_the_fine_tuned_model(llama, tmp_path):
    export_vllm(llama / "model", llama / "adapter", tmp_path / "out")
    code = (
        "import sys, torch, transformers, peft\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "model = peft.PeftModel.from_pretrained(model, sys.argv[1] + '/adapter').eval()\n"
        "assert 'qlora' not in sys.modules\n"
        "ids = torch.tensor([[int(i) for i in sys.argv[3].split()]])\n"
        "with torch.no_grad(): torch.save(model(ids).logits.float(), sys.argv[2])\n"
    )
    ids = AutoTokenizer.from_pretrained(llama / "model")(zoo.TEXT)["input_ids"][:40]
    arguments = [str(tmp_path / "out"), str(tmp_path / "logits.pt"), " ".join(map(str, ids))]
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    model, _ = load_for_inference(llama / "model", llama / "adapter", torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits
        with model.disable_adapter():
            base = model(torch.tensor([ids])).logits
    assert difference(torch.load(tmp_path / "logits.pt"), wanted) < BFLOAT16
    assert difference(base, wanted) > 0.5


def test_the_command_and_the_readme(llama, tmp_path):
    command = export_vllm(llama / "model", llama / "adapter", tmp_path / "my out")
    words = shlex.split(command)
    assert words[:3] == ["vllm", "serve", str(tmp_path / "my out")]
    assert words[words.index("--max-lora-rank") + 1] == "8"  # vLLM has no 4
    assert words[-1] == f"tuned={tmp_path / 'my out' / 'adapter'}"
    readme = (tmp_path / "my out" / "README.md").read_text()
    assert "vllm serve 'my out' --quantization bitsandbytes" in readme
    assert str(tmp_path) not in readme
    files = {path.name for path in (tmp_path / "my out" / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}


def test_ranks_and_scalings_that_differ_become_one(llama, tmp_path):
    model, _ = load_quantized(llama / "model", torch.float32, progress=False)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["up_proj", "down_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"down_proj": 5},
        use_rslora=True,
    )
    model = peft.get_peft_model(model, config)
    stir(model)
    save_lora(model, tmp_path / "adapter")
    save_base_facts(tmp_path / "adapter", model, llama / "model")
    export_vllm(llama / "model", tmp_path / "adapter", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4, False)
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for module in ("up_proj", "down_proj"):
        name = f"base_model.model.model.layers.1.mlp.{module}"
        wanted = model.get_submodule(name).get_delta_weight("default")
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 4
        assert difference(b @ a, wanted) < 1e-6
    plain, _ = load_quantized(tmp_path / "out", torch.float32, progress=False)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").eval()
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert difference(again(ids).logits, model.eval()(ids).logits) < BFLOAT16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "is more than LoRA factors"),
        ({"modules_to_save": ["lm_head"]}, "is more than LoRA factors"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, which is not a 4-bit layer"),
        ({"quant_type": "int4"}, "trained on a base in int4: bitsandbytes, and so vLLM, has nf4 and fp4"),
        ({"rank": 600}, "has rank 600: vLLM's --max-lora-rank is at most 512"),
    ],
)
def test_what_vllm_cannot_add_is_refused(llama, tmp_path, options, message):
    zoo.save_adapter(llama / "model", tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=message):
        export_vllm(llama / "model", tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [("gpt2", "c_attn", r"is a transposed layer \(Conv1D\)"), ("mixtral", "q_proj", "has 4-bit experts")],
)
def test_models_that_vllm_cannot_load_in_4_bit_are_refused(tmp_path, name, target, message):
    base = save_dense(name, tmp_path / "model")
    made = zoo.tokenizer("gpt2")
    made.save_pretrained(base)
    zoo.save_adapter(base, tmp_path / "adapter", target_modules=[target])
    with pytest.raises(ValueError, match=message):
        export_vllm(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda"])
def test_an_adapter_that_changed_its_base_is_refused(llama, tmp_path, kind):
    """Its factors belong to weights that are in no file."""
    shutil.copytree(llama / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": kind}))
    with pytest.raises(ValueError, match=f"init_lora_weights='{kind}' changes the base weights"):
        export_vllm(llama / "model", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
