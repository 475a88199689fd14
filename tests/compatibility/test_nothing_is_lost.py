"""Saving keeps everything that was trained or prepared, or raises an error."""

import json

import pytest
import torch
import transformers
from compatibility.refusals import result_or_refusal
from tiny_models import FOUR_BIT, SAME, difference, llama, logits, reloaded, stir

import qlora


def classifier(folder, seed):
    torch.manual_seed(seed)
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


def test_a_freshly_initialized_classification_head_is_not_frozen_in_4_bit(tmp_path):
    """Expects the head to stay dense, or a ValueError of prepare_model that names it."""
    llama().save_pretrained(tmp_path)
    model = classifier(tmp_path, 1)
    if result_or_refusal(lambda: qlora.prepare_model(model, rank=4), "score", "head") is not None:
        assert model.score.weight.is_floating_point()


def test_other_trained_parameters_are_saved_with_the_adapter(tmp_path):
    """Expects the trained model after reloading, or an error of save_adapter that names what it cannot save."""
    model = llama()
    qlora.prepare_model(model, rank=4)
    model.model.norm.weight.requires_grad_(True)
    model.model.norm.weight.data.mul_(3)
    if result_or_refusal(lambda: qlora.save_adapter(model, tmp_path), "norm") is not None:
        again = llama()
        qlora.prepare_model(again, rank=4)
        qlora.load_adapter(again, tmp_path)
        assert difference(logits(again), logits(model)) < SAME


def test_a_prepared_model_saved_by_save_pretrained_is_not_read_back_with_random_weights(tmp_path):
    """Expects the saved model's results after loading, or an error of save_pretrained or from_pretrained.

    The error must say that this is not a checkpoint of a whole model, by naming prepare_model, save_adapter, the
    adapters, or 4 bit.
    """
    model = llama()
    qlora.prepare_model(model, rank=4)

    def round_trip():
        model.save_pretrained(tmp_path)
        return reloaded(tmp_path)

    again = result_or_refusal(round_trip, "prepare_model", "save_adapter", "adapter", "4 bit", "4-bit", "qlora")
    if again is not None:
        assert difference(logits(again), logits(model)) < FOUR_BIT


def test_an_adapter_saved_through_torch_compile_fits_the_model_itself(tmp_path):
    """Expects the model's names in the file, or an error of save_adapter that names the wrapper."""
    model = llama()
    qlora.prepare_model(model, rank=4)
    stir(model)
    compiled = torch.compile(model)
    if result_or_refusal(lambda: qlora.save_adapter(compiled, tmp_path), "_orig_mod", "compile", "wrap") is not None:
        again = llama()
        qlora.prepare_model(again, rank=4)
        qlora.load_adapter(again, tmp_path)
        assert difference(logits(again), logits(model)) < SAME


HEADS = {
    "BertForSequenceClassification": ("classifier",),
    "BertForTokenClassification": ("classifier",),
    "LlamaForSequenceClassification": ("score",),
    "T5ForSequenceClassification": ("classification_head.dense", "classification_head.out_proj"),
}


@pytest.mark.parametrize("way", ["prepare_model", "QLoRAConfig"])
@pytest.mark.parametrize("name", HEADS)
def test_new_heads_of_every_task_stay_dense(tmp_path, name, way):
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    if name.startswith("T5"):
        sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    else:
        sizes["num_hidden_layers"] = 1
    torch.manual_seed(0)
    body = kind(kind.config_class(**sizes, pad_token_id=0))
    if way == "prepare_model":
        qlora.prepare_model(body, rank=2)
    else:
        body.save_pretrained(tmp_path)
        body = kind.from_pretrained(tmp_path, quantization_config=qlora.QLoRAConfig())
    for head in HEADS[name]:
        assert type(body.get_submodule(head)) is torch.nn.Linear
    assert any(isinstance(m, qlora.nn.Linear4bit) for m in body.modules())


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_adapters_are_saved_and_loaded_through_every_wrapper(tmp_path, wrap):
    model, again = llama(), llama()
    for each in (model, again):
        qlora.prepare_model(each, rank=4)
    stir(model)
    qlora.save_adapter(wrap(model), tmp_path)
    qlora.load_adapter(wrap(again) if wrap is torch.nn.DataParallel else again, tmp_path)
    assert difference(logits(again), logits(model)) < SAME
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_a_part_that_is_compiled_on_its_own_is_refused(tmp_path):
    model = llama()
    qlora.prepare_model(model, rank=4)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    with pytest.raises(ValueError, match="_orig_mod"):
        qlora.save_adapter(model, tmp_path)


def test_saving_is_possible_again_once_the_model_is_merged(tmp_path):
    model = llama()
    qlora.prepare_model(model, rank=4)
    with pytest.raises(ValueError, match="save_adapter"):
        model.save_pretrained(tmp_path)
    qlora.merge_and_unload(model)
    model.save_pretrained(tmp_path)
    assert difference(logits(reloaded(tmp_path)), logits(model)) < SAME
