"""qlora merge: the folders that it writes are read by transformers and bitsandbytes without qlora, and its report."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models
import torch
from export import zoo
from tiny_models import CONFIGS, TOKENS, difference, save_dense

import qlora
from qlora.cli import main
from qlora.integrations.transformers import quantized_layers
from qlora.models.loading import load_for_inference, load_quantized

# The layers that the adapter is on.
TARGETS = {
    "gpt2": ["c_attn", "c_fc"],
    "falcon": ["query_key_value", "dense_h_to_4h"],
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ["q_b_proj", "o_proj"]),
}
# Loads folders as users without qlora do; saves their weights, those of bitsandbytes dequantized by it, and logits.
PLAIN = """
import sys, torch, transformers
tokens = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "quant_state") or hasattr(getattr(module, "weight", None), "quant_state"):
            import bitsandbytes
            weight = module.weight
            weights[name + ".weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    try:
        with torch.no_grad(): logits = model(tokens).logits.float()
    except AssertionError:  # bitsandbytes' kernels for CPUs refuse some shapes
        logits = None
    torch.save((weights, logits), folder + "/seen.pt")
assert "qlora" not in sys.modules
"""
BFLOAT16 = 32 * 2.0**-9  # of logits: half a unit of its 8 bits, some sixteen roundings in each of two layers


@pytest.fixture(scope="module", params=CONFIGS)
def world(request, tmp_path_factory):
    """A base, an adapter, their merged weights in float32, and what they compute together."""
    folder = tmp_path_factory.mktemp(request.param)
    save_dense(request.param, folder / "model")
    zoo.tokenizer("gpt2").save_pretrained(folder / "model")
    targets = TARGETS.get(request.param, ["q_proj", "o_proj"])
    zoo.save_adapter(folder / "model", folder / "adapter", target_modules=targets)
    model, _ = load_for_inference(folder / "model", folder / "adapter", torch.float32)
    torch.save(TOKENS, folder / "tokens.pt")
    wanted = tiny_models.logits(model)
    exact = qlora.merge_and_unload(model, dtype=torch.float32).model.state_dict()
    return request.param, folder, exact, wanted


def merge(folder, output, *more):
    command = ["merge", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--output", str(output)]
    return main([*command, *more])


def without_qlora(folder, *outputs):
    """Weights and logits of model folders, in a process that does not import qlora."""
    command = [sys.executable, "-c", PLAIN, str(folder / "tokens.pt"), *map(str, outputs)]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    return [torch.load(output / "seen.pt") for output in outputs]


@pytest.mark.filterwarnings("ignore:merged into 4 bit")
def test_merged_folders_load_without_qlora(world, tmp_path, capsys):
    name, folder, exact, wanted = world
    assert merge(folder, tmp_path / "dense") == 0
    assert merge(folder, tmp_path / "nf4", "--format", "nf4") == 0
    if name == "falcon":
        assert merge(folder, tmp_path / "bnb", "--format", "bitsandbytes") == 1
        assert "is a FalconLinear, which transformers leaves dense" in capsys.readouterr().err
        assert not (tmp_path / "bnb").exists()
        ((weights, logits),) = without_qlora(folder, tmp_path / "dense")
    else:
        assert merge(folder, tmp_path / "bnb", "--format", "bitsandbytes") == 0
        (weights, logits), (packed, packed_logits) = without_qlora(folder, tmp_path / "dense", tmp_path / "bnb")
        assert_same_4_bit_weights(packed, tmp_path / "nf4")
        if packed_logits is not None and name != "gpt_oss":  # see below
            nf4 = tiny_models.logits(load_quantized(tmp_path / "nf4", torch.float32, progress=False)[0])
            assert difference(packed_logits, nf4) < BFLOAT16
    assert weights.keys() == exact.keys()
    for key, value in exact.items():
        router = name.startswith("deepseek") and ".mlp.gate." in key  # transformers keeps it in float32
        assert weights[key].dtype == (torch.float32 if router else torch.bfloat16), key
        assert ((weights[key].float() - value).abs() <= 2.0**-8 * value.abs()).all(), key
    # The rounding of weights changes the choice of an expert in the second token of gpt_oss, and with it the answer.
    assert difference(logits, wanted) < BFLOAT16 or name == "gpt_oss"


def assert_same_4_bit_weights(packed, folder):
    model, _ = load_quantized(folder, torch.bfloat16, progress=False)
    layers = dict(quantized_layers(model))
    assert layers
    for name, layer in layers.items():
        if isinstance(layer, qlora.nn.Experts4bit):  # bitsandbytes keeps them dense
            dense = layer.to_experts(torch.bfloat16)
            assert all(torch.equal(packed[f"{name}.{leaf}"], getattr(dense, leaf)) for leaf in layer.weight_names)
        else:
            ours = layer.dequantize(torch.bfloat16)
            assert torch.equal(packed[f"{name}.weight"], ours), name


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_the_report_names_every_layer(world, tmp_path, capsys):
    _, folder, _, _ = world
    assert merge(folder, tmp_path / "dense") == 0
    out = capsys.readouterr().out
    assert "4 layers merged to bfloat16; rounding adds at most" in out
    assert f"report: {tmp_path / 'dense'}/merge.json" in out
    report = json.loads((tmp_path / "dense" / "merge.json").read_text())
    assert report["adapter_kept"] == pytest.approx(1.0, abs=0.01)
    assert set(report["layers"]) == {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qo"}
    layer = report["layers"]["model.layers.0.self_attn.q_proj"]
    assert layer["format"] == "bfloat16"
    assert 0 < layer["relative_error"] < 2.0**-8
    assert set(layer) == {"adapter", "format", "relative_error", "max_abs_error", "adapter_kept"}


@pytest.mark.parametrize("world", ["llama"], indirect=True)
def test_a_format_that_the_base_does_not_have_is_refused(world, tmp_path, capsys):
    _, folder, _, _ = world
    assert merge(folder, tmp_path / "out", "--format", "int4") == 1
    assert "--format int4: the base is in nf4, use that" in capsys.readouterr().err
    assert merge(folder, tmp_path / "out", "--format", "gguf") == 1
    error = capsys.readouterr().err
    assert "--format 'gguf' is unknown: use one of bf16, nf4, fp4, int4, bitsandbytes" in error
    zoo.save_adapter(folder / "model", tmp_path / "adapter", quant_type="int4", target_modules=["q_proj"])
    command = ["merge", "--model", str(folder / "model"), "--adapter", str(tmp_path / "adapter")]
    assert main([*command, "--output", str(tmp_path / "out"), "--format", "bitsandbytes"]) == 1
    assert "--format bitsandbytes: the base is in int4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
