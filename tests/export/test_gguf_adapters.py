"""Adapters alone as GGUF files: their keys, their tensors, and adapters that cannot stand alone."""

import json

import numpy as np
import pytest
import torch
from export import zoo
from gguf import GGUFReader
from tiny_models import stir

from qlora.adapters.lora import save_lora
from qlora.export.gguf_adapter import export_gguf_adapter
from qlora.export.gguf_tensors import interleave_rows
from qlora.export.lora import read_factors
from qlora.models.loading import load_quantized


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: zoo.save(name, folder / name) for name in ("llama", "qwen2", "llama-biased-tied")}


def tensors_of(path):
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def test_the_file_of_an_adapter(bases, tmp_path):
    zoo.save_adapter(bases["llama"], tmp_path / "adapter")
    _, _, layers = export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["llama"])
    reader = GGUFReader(tmp_path / "a.gguf")
    keys = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 12.0,
    }
    assert {key: reader.fields[key].contents() for key in keys} == keys
    found, factors = tensors_of(tmp_path / "a.gguf"), read_factors(tmp_path / "adapter")
    assert layers == len(factors) == 21
    assert len(found) == 42
    up = factors["model.layers.2.mlp.up_proj"]
    assert up.scaling == 3.0
    assert (found["blk.2.ffn_up.weight.lora_a"] == up.a.numpy()).all()
    assert (found["blk.2.ffn_up.weight.lora_b"] == up.b.numpy()).all()


def test_rows_of_b_are_reordered_as_those_of_the_weight(bases, tmp_path):
    for name, interleaved in (("llama", True), ("qwen2", False)):
        zoo.save_adapter(bases[name], tmp_path / name, target_modules=["q_proj", "k_proj", "v_proj"])
        export_gguf_adapter(tmp_path / name, tmp_path / f"{name}.gguf", model=bases[name])
        found, factors = tensors_of(tmp_path / f"{name}.gguf"), read_factors(tmp_path / name)
        for module, letter, heads in (("q_proj", "q", 4), ("k_proj", "k", 2), ("v_proj", "v", None)):
            b = factors[f"model.layers.0.self_attn.{module}"].b
            wanted = interleave_rows(b, heads) if interleaved and heads else b
            assert (found[f"blk.0.attn_{letter}.weight.lora_b"] == wanted.numpy()).all()


def test_interleaving_pairs_the_rows_that_are_rotated_together():
    rows = torch.arange(16)[:, None]  # two heads of eight rows; i and i + 4 are rotated together
    wanted = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert interleave_rows(rows, 2).flatten().tolist() == wanted


@pytest.mark.parametrize("rslora", [False, True])
def test_scalings_that_differ_are_multiplied_into_b(bases, tmp_path, rslora):
    import peft

    model, _ = load_quantized(bases["llama"], torch.float32, progress=False)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["up_proj", "down_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 5},
        use_rslora=rslora,
    )
    model = peft.get_peft_model(model, config)
    stir(model)
    save_lora(model, tmp_path / "adapter")
    export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["llama"])
    found = tensors_of(tmp_path / "a.gguf")
    alpha = GGUFReader(tmp_path / "a.gguf").fields["adapter.lora.alpha"].contents()
    for layer in range(3):
        for module, name in (("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
            a, b = (found[f"blk.{layer}.{name}.weight.lora_{x}"].astype(np.float64) for x in "ab")
            assert a.shape[0] == (2 if module == "up_proj" else 4)
            wanted = model.base_model.model.model.layers[layer].mlp.get_submodule(module).get_delta_weight("default")
            error = np.abs(alpha / a.shape[0] * b @ a - wanted.detach().double().numpy()).max()
            assert error <= 4 * 2.0**-24 * np.abs(b).max() * np.abs(a).max() * alpha  # roundings of B, alpha, product


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "is more than LoRA factors"),
        ({"modules_to_save": ["norm"]}, r"is more than LoRA factors of linear layers \(e.g. model.*norm.weight"),
        ({"bias": "all"}, "Export the merged model"),
    ],
)
def test_what_a_separate_adapter_cannot_express_is_refused(bases, tmp_path, options, message):
    zoo.save_adapter(bases["llama-biased-tied"], tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=message):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["llama-biased-tied"])
    assert not (tmp_path / "a.gguf").exists()


def test_an_adapter_on_a_tied_head_is_refused(bases, tmp_path):
    zoo.save_adapter(bases["qwen2"], tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapts the head, which shares the embedding's weight"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["qwen2"])


def test_adapters_of_another_base_and_other_bad_inputs(bases, tmp_path):
    zoo.save_adapter(bases["llama"], tmp_path / "adapter")
    with pytest.raises(ValueError, match="was trained on another base"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["qwen2"])
    (tmp_path / "adapter" / "qlora_config.json").unlink()  # as of another tool: no fingerprint
    longer = zoo.save("mistral", tmp_path / "mistral")
    with pytest.raises(ValueError, match=r"self_attn.* has lora_A .* but the base's weight is \(64, 64\)"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=longer)
    with pytest.raises(ValueError, match="type 'q8_0' is not for adapters: use one of f16, bf16, f32"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["llama"], tensor_type="q8_0")
    with pytest.raises(FileNotFoundError, match="it is not an adapter folder"):
        export_gguf_adapter(bases["llama"], tmp_path / "a.gguf")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base: pass --model"):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(FileExistsError):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "a.gguf", model=bases["llama"])
