"""Adapters on disk: PEFT's format in both directions, atomic writes, and checks before anything changes."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TiedModel, save_llama

import qlora
from qlora.nn import Linear4bit
from qlora.nn.finding import qlora_layers
from qlora.storage import files


def prepared(rank=4, seed=0, **options):
    torch.manual_seed(seed)
    model = TiedModel()
    qlora.prepare_model(model, rank=rank, **options)
    return model


def randomize(model, name="default"):
    with torch.no_grad():
        for layer in qlora_layers(model).values():
            layer.lora_b[name].normal_()


IDS = torch.arange(12)[None]


def test_round_trip(tmp_path):
    first, second = prepared(alpha=8), prepared(rank=2)
    randomize(first)
    qlora.save_adapter(first, tmp_path)
    qlora.load_adapter(second, tmp_path)
    assert torch.equal(first(IDS), second(IDS))


def test_loading_under_another_name_keeps_the_first(tmp_path):
    model = prepared()
    randomize(model)
    before = model(IDS)
    qlora.save_adapter(model, tmp_path)
    qlora.load_adapter(model, tmp_path, "second")
    layer = model.blocks[0].up
    assert layer.active_adapter == "second"
    assert set(layer.adapters) == {"default", "second"}
    assert torch.equal(model(IDS), before)


def test_layers_of_different_rank_and_alpha(tmp_path):
    first = prepared()
    layer = first.blocks[1].up
    layer.delete_adapter("default")
    layer.add_adapter("default", 7, 3)
    randomize(first)
    qlora.save_adapter(first, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^blocks\.1\.up": 7}
    assert config["alpha_pattern"] == {r"^blocks\.1\.up": 3.0}
    second = prepared()
    qlora.load_adapter(second, tmp_path)
    assert torch.equal(first(IDS), second(IDS))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def dequantized_twin(folder, model):
    """The same model, dense, for PEFT's adapter."""
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in qlora_layers(model).items():
        twin.get_submodule(name).weight.data = layer.base.dequantize(torch.float32)
    return twin


def test_peft_reads_what_we_write(llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    qlora.prepare_model(model, rank=4, alpha=6)
    randomize(model)
    qlora.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(dequantized_twin(llama, model), str(tmp_path))
    assert torch.allclose(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_read_what_peft_writes(llama, tmp_path, use_rslora):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    qlora.prepare_model(model, rank=4)
    config = LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules="all-linear",
        init_lora_weights=False,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(dequantized_twin(llama, model), config)
    theirs.save_pretrained(tmp_path)
    qlora.load_adapter(model, tmp_path)
    theirs.eval()
    assert torch.allclose(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_pefts_alpha_pattern_is_a_regular_expression_for_the_end_of_a_name(tmp_path):
    model = prepared()
    qlora.save_adapter(model, tmp_path)
    edit_config(tmp_path, alpha_pattern={"up": 64, r"blocks\.1\..*": 2})
    qlora.load_adapter(model, tmp_path)
    alphas = {name: layer.adapters["default"].alpha for name, layer in qlora_layers(model).items()}
    assert alphas == {"blocks.0.up": 64, "blocks.0.down": 4, "blocks.1.up": 64, "blocks.1.down": 2}


def test_an_adapter_of_another_model_names_its_keys_and_changes_nothing(tmp_path):
    other = torch.nn.ModuleDict({"trunk": TiedModel()})
    qlora.prepare_model(other, rank=4)
    qlora.save_adapter(other, tmp_path)
    model = prepared()
    randomize(model)
    before = model(IDS)
    with pytest.raises(ValueError, match=r"belongs to another model: 8 keys.*base_model\.model\.trunk\.blocks\.0"):
        qlora.load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), before)


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


KEY = "base_model.model.blocks.0.up.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit_weights(d, lambda t: t.pop(KEY)), "lacks .*blocks.0.up.lora_A"),
        (lambda d: edit_weights(d, lambda t: t.update({KEY: torch.zeros(4, 3)})), r"lora_A \(4, 3\)"),
        (lambda d: os.truncate(d / "adapter_model.safetensors", 500), "truncated or damaged"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "truncated or damaged"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "does not exist"),
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "must hold a JSON object, not list"),
        (lambda d: edit_config(d, lora_dropout=1.0), r"lora_dropout=1.0 must be in \[0, 1\)"),
        (lambda d: edit_config(d, lora_alpha=None), "lora_alpha=None must be a number"),
        (lambda d: edit_config(d, alpha_pattern={"(": 8}), "'\\(' is not a regular expression"),
        (lambda d: edit_config(d, alpha_pattern={"up": "x"}), "alpha_pattern='x' must be a number"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "peft_type='IA3'"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}'), "r=0 must be"),
        (
            lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "use_dora": true}'),
            "use_dora",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_before_anything_changes(tmp_path, damage, message):
    model = prepared()
    randomize(model)
    qlora.save_adapter(model, tmp_path)
    before = model(IDS)
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        qlora.load_adapter(model, tmp_path)
    assert torch.equal(model(IDS), before)


def test_saving_an_adapter_that_no_layer_has(tmp_path):
    with pytest.raises(ValueError, match="no layer has an adapter named 'x'"):
        qlora.save_adapter(prepared(), tmp_path, "x")


@pytest.mark.parametrize("failing_file", [1, 2])
def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch, failing_file):
    """Whichever file does not fit on the disk, weights and configuration stay those of the same adapter."""
    model = prepared()
    randomize(model)
    qlora.save_adapter(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomize(model)

    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing_file:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        qlora.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_layers_without_the_adapter_are_made_dense_too(tmp_path):
    """Loads an adapter of only some layers into a model with adapters on all layers."""
    partial = TiedModel()
    qlora.prepare_model(partial, rank=4, target_modules=["up"])
    randomize(partial)
    qlora.save_adapter(partial, tmp_path)
    model = prepared()
    qlora.load_adapter(model, tmp_path)
    before = model(IDS)
    _, reports = qlora.merge_and_unload(model, dtype=torch.float32)
    assert sorted(reports) == ["blocks.0.up", "blocks.1.up"]
    assert type(model.blocks[0].down) is torch.nn.Linear
    assert torch.allclose(model(IDS), before, rtol=1e-4, atol=1e-4)
    qlora.merge_and_unload(partial, requantize=True)
    assert type(partial.blocks[0].down) is Linear4bit


def test_layers_that_an_adapter_does_not_cover_do_not_keep_another_one(tmp_path):
    partial = TiedModel()
    qlora.prepare_model(partial, rank=4, target_modules=["up"])
    qlora.save_adapter(partial, tmp_path)
    model = prepared()
    qlora.load_adapter(model, tmp_path, "second")
    assert model.blocks[0].up.active_adapter == "second"
    assert model.blocks[0].down.active_adapter is None
    assert not model.blocks[0].down.lora_a["default"].requires_grad


@pytest.mark.parametrize("requantize", [False, True])
def test_merge_and_unload_replaces_every_layer(requantize):
    model = prepared()
    randomize(model)
    with torch.no_grad():
        for layer in qlora_layers(model).values():
            layer.lora_b["default"] *= 0.05
    before = model(IDS)
    _, reports = qlora.merge_and_unload(model, requantize=requantize)
    assert sorted(reports) == ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up"]
    assert not qlora_layers(model)
    similarity = torch.nn.functional.cosine_similarity(model(IDS).flatten(), before.flatten(), dim=0)
    assert similarity > 0.99
    with pytest.raises(ValueError, match="nothing to merge"):
        qlora.merge_and_unload(model)
