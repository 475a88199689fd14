"""Adapters that were trained on a base other than the one on disk."""

import copy
import json

import peft
import pytest
import torch
from compatibility.refusals import result_or_refusal
from tiny_models import FOUR_BIT, difference, llama, logits, stir

import qlora
from qlora.adapters.lora import check_adapter_folder, load_adapter_into, save_base_facts
from qlora.models.loading import load_quantized


def test_an_adapter_whose_initialization_changed_the_base_is_not_put_on_the_unchanged_one(tmp_path):
    """Expects a ValueError that names the initialization, or the result of PEFT's own model, within the 4-bit error.

    An untrained PiSSA adapter changes nothing, because its base is the weight minus the adapter.
    """
    options = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights="pissa")
    trained = peft.get_peft_model(llama(), options)
    trained.save_pretrained(tmp_path)
    model = llama()
    qlora.prepare_model(model, rank=1)
    if result_or_refusal(lambda: qlora.load_adapter(model, tmp_path), "pissa", "init_lora_weights") is not None:
        assert difference(logits(model), logits(trained)) < FOUR_BIT


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_16"),
        ("alora_invocation_tokens", [1, 2]),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 1]]),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("an_option_of_the_future", {"x": 1}),
    ],
)
def test_options_that_change_what_an_adapter_computes_are_refused_by_name(tmp_path, option, value):
    model = llama()
    qlora.prepare_model(model, rank=4)
    qlora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(ValueError, match=option):
        qlora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_commands_load_peft_adapters_of_every_kind(tmp_path, options):
    """Expects the result of PEFT's own model, within the 4-bit error."""
    llama().save_pretrained(tmp_path / "model")
    trained = peft.get_peft_model(llama(), peft.LoraConfig(r=16, target_modules="all-linear", **options))
    stir(trained, 0.01)
    trained.save_pretrained(tmp_path / "adapter")
    base, _ = load_quantized(tmp_path / "model", torch.float32, progress=False)
    check_adapter_folder(tmp_path / "adapter", tmp_path / "model")
    model = load_adapter_into(base, tmp_path / "adapter")
    assert difference(logits(model), logits(trained)) < FOUR_BIT


def adapter_of(model, folder, **options):
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **options)).save_pretrained(folder)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    base, _ = load_quantized(tmp_path / "model", torch.float32, progress=False)
    adapter_of(llama(hidden_size=128), tmp_path / "wide")
    adapter_of(llama(num_hidden_layers=3), tmp_path / "deep")
    for name in ("wide", "deep"):
        with pytest.raises(ValueError, match=f"{name}.* this model"):
            load_adapter_into(copy.deepcopy(base), tmp_path / name)


def test_an_adapter_of_another_task_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    adapter_of(llama(), tmp_path / "adapter", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="SEQ_CLS"):
        check_adapter_folder(tmp_path / "adapter", tmp_path / "model")


def test_an_adapter_knows_its_base_again(tmp_path):
    """Another checkpoint of the same shape differs from the base only in its weights."""
    for seed in (0, 1):
        llama(seed).save_pretrained(tmp_path / f"model{seed}")
    adapter_of(llama(), tmp_path / "adapter", task_type="CAUSAL_LM")
    quantized, _ = load_quantized(tmp_path / "model0", torch.float32, progress=False)
    save_base_facts(tmp_path / "adapter", quantized, tmp_path / "model0")
    assert check_adapter_folder(tmp_path / "adapter", tmp_path / "model0")["quant_type"] == "nf4"
    with pytest.raises(ValueError, match="trained on another base"):
        check_adapter_folder(tmp_path / "adapter", tmp_path / "model1")
