"""transformers' from_pretrained with QLoRAConfig: loading, saving, and errors."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TOKENS, hashes, save_dense
from torch import nn
from transformers import AutoModelForCausalLM

import qlora
from qlora.integrations.transformers import quantized_layers
from qlora.nn import Experts4bit, Linear4bit
from qlora.nn.packed import STATISTICS

ARCHITECTURES = ["llama", "gpt2", "falcon", "mixtral", "qwen3_moe", "gpt_oss"]


def load(folder, **options):
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_quantized(folder, dtype=torch.float32, **options):
    return load(folder, dtype=dtype, quantization_config=qlora.QLoRAConfig(**options))


def with_dequantized_weights(dense, quantized):
    """The dense model with the dequantized weights of the quantized one."""
    for name, layer in quantized_layers(quantized):
        target = dense.get_submodule(name)
        if isinstance(layer, Experts4bit):
            for weight in layer.weight_names:
                getattr(target, weight).data = layer.dequantize(weight)
        else:
            weight = layer.dequantize()
            target.weight.data = weight.t() if type(target).__name__ == "Conv1D" else weight
    return dense


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_computes_saves_and_reloads(tmp_path, name):
    dense = save_dense(name, tmp_path / "dense")
    model = load_quantized(dense)
    # Linear layers and experts are in 4 bit, the head is not.
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear4bit)]
    assert left in ([], ["lm_head"])
    assert any(isinstance(m, Experts4bit) for m in model.modules()) == (name in ("mixtral", "qwen3_moe", "gpt_oss"))
    reference = with_dequantized_weights(load(dense), model)
    logits = model(TOKENS).logits
    # Sums of at most 128 float32 products in another order, through two layers.
    torch.testing.assert_close(logits, reference(TOKENS).logits, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path / "first")
    reloaded = load(tmp_path / "first")
    assert torch.equal(reloaded(TOKENS).logits, logits)
    reloaded.save_pretrained(tmp_path / "second")
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    assert reloaded.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()

    restored = reloaded.dequantize()
    assert not list(quantized_layers(restored))
    assert not hasattr(restored.config, "quantization_config")
    torch.testing.assert_close(restored(TOKENS).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"quant_type": "fp4", "double_quant": False},
        {"quant_type": "int4", "block_size": 32},
        {"block_size": 128, "skip_modules": ["q_proj"]},
    ],
)
def test_options_are_kept(tmp_path, options):
    model = load_quantized(save_dense("llama", tmp_path / "dense"), **options)
    model.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert torch.equal(reloaded(TOKENS).logits, model(TOKENS).logits)
    layer = reloaded.model.layers[0].self_attn.k_proj
    assert layer.quant_type == options.get("quant_type", "nf4")
    assert layer.block_size == options.get("block_size", 64)
    assert (layer.nested_absmax.numel() > 0) == options.get("double_quant", True)
    assert isinstance(reloaded.model.layers[0].self_attn.q_proj, Linear4bit) == ("skip_modules" not in options)


def test_shards_load_and_save(tmp_path):
    dense = save_dense("llama", tmp_path / "dense")
    load(dense).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    expected = load_quantized(dense)
    model = load_quantized(tmp_path / "sharded")
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert torch.equal(load(tmp_path / "saved")(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_cast_leaves_the_statistics_alone(tmp_path, name):
    model = load_quantized(save_dense(name, tmp_path), double_quant=False)
    before = {key: value.clone() for key, value in model.named_buffers() if key.endswith(STATISTICS)}
    assert before
    model.to(torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert all(buffers[key].dtype == value.dtype and torch.equal(buffers[key], value) for key, value in before.items())
    assert model(TOKENS).logits.dtype == torch.bfloat16
    assert not any(p.requires_grad for _, layer in quantized_layers(model) for p in layer.parameters())


def test_compute_dtype(tmp_path):
    dense = save_dense("llama", tmp_path)
    model = load_quantized(dense, dtype=torch.float16, compute_dtype="float32")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64).half()
    assert torch.equal(layer(x), layer(x.float()).half())
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(layer(x), layer(x.bfloat16()).half())


def test_generates_as_the_dense_model_does(tmp_path):
    dense = save_dense("llama", tmp_path)
    model = load_quantized(dense)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = with_dequantized_weights(load(dense), model).generate(TOKENS, **options)
    assert torch.equal(model.generate(TOKENS, **options), expected)


MEASURE_PEAK = """
import json, sys, threading, time
import torch, qlora
from transformers import AutoModelForCausalLM

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=qlora.QLoRAConfig())(torch.ones(1, 4).long())
baseline = peak = resident()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=qlora.QLoRAConfig())
done = True
thread.join()
result = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"extra": peak - baseline, "result": result}))
"""


def test_peak_memory_of_a_load(tmp_path):
    """At most 1.15 x the quantized model + the largest tensor, not counting the file's droppable mapped pages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = save_dense("llama", tmp_path / "small")
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=1000)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_PEAK, str(tmp_path / "large"), str(small)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    largest = 1024 * 4096 * 4
    assert figures["extra"] <= 1.15 * figures["result"] + largest, figures


def run_python(code: str, *arguments: str):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_importing_qlora_is_enough_in_either_order(tmp_path):
    load_quantized(save_dense("llama", tmp_path / "dense")).save_pretrained(tmp_path / "saved")
    check = "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(m.model.layers[0].mlp.up_proj))"
    for imports in (
        "import qlora; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_config; import qlora",
    ):
        result = run_python(f"import sys; {imports}; {check}", str(tmp_path / "saved"))
        assert "qlora.nn.linear4bit.Linear4bit" in result.stdout, result.stderr
    result = run_python("import sys, qlora; print([m for m in sys.modules if m == 'transformers'])")
    assert result.stdout.strip() == "[]", "import qlora imported transformers"
    # Without qlora, transformers raises an error that names the unknown method.
    result = run_python(f"import sys; from transformers import AutoModelForCausalLM; {check}", str(tmp_path / "saved"))
    assert result.returncode != 0
    assert "qlora" in result.stderr


def edit(folder, change):
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def test_damaged_checkpoints_are_refused(tmp_path):
    dense = save_dense("llama", tmp_path / "dense")
    layer = "model.layers.1.mlp.up_proj"

    def saved(name):
        load_quantized(dense).save_pretrained(tmp_path / name)
        return tmp_path / name

    for leaf in ("weight", "absmax", "nested_offset"):
        folder = saved(f"missing-{leaf}")
        edit(folder, lambda state, leaf=leaf: state.pop(f"{layer}.{leaf}"))
        with pytest.raises(ValueError, match=rf"lacks 1 tensors of 4-bit layers.*{layer}\.{leaf}"):
            load(folder)
    folder = saved("size")
    edit(folder, lambda state: state.update({f"{layer}.absmax": state[f"{layer}.absmax"][:-1].clone()}))
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        load(folder)
    folder = saved("extra")  # the file has double quantization, the config does not
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["double_quant"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        load(folder)
    folder = saved("format")  # the config has another format than the file
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_type"] = "fp4"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the state dict holds a weight in .*nf4"):
        load(folder)
    folder = saved("not finite")
    dense_state = load_file(dense / "model.safetensors")
    dense_state[f"{layer}.weight"][3, 5] = float("nan")
    save_file(dense_state, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="CONVERSION"):
        load_quantized(dense)


def test_what_cannot_be_quantized_is_named_and_skipped_only_when_asked(tmp_path):
    from transformers import LlamaForCausalLM

    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Routed(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].mlp.gate_proj = Router(64, 128, bias=False)

    dense = save_dense("llama", tmp_path)
    options = {"dtype": torch.float32}
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate_proj \(Router\) cannot be quantized.*skip_modules"):
        Routed.from_pretrained(dense, quantization_config=qlora.QLoRAConfig(), **options)
    config = qlora.QLoRAConfig(skip_modules=["model.layers.1.mlp.gate_proj"])
    model = Routed.from_pretrained(dense, quantization_config=config, **options)
    assert type(model.model.layers[1].mlp.gate_proj) is Router
    assert isinstance(model.model.layers[0].mlp.gate_proj, Linear4bit)
    with pytest.raises(ValueError, match="has no layer to quantize"):
        load_quantized(dense, skip_modules=["model"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "nf3"}, "nf3"),
        ({"block_size": 48}, "48"),
        ({"compute_dtype": "int8"}, "int8"),
        ({"compute": "float32"}, "no option"),
        ({"checkpoint_format": "gguf"}, "gguf"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        qlora.QLoRAConfig(**options)
