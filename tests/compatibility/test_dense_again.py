"""A merged or dequantized model is a dense model, also when it is saved."""

import peft
import pytest
import torch
import transformers
from compatibility.refusals import result_or_refusal
from tiny_models import SAME, SIZES, difference, llama, logits, reloaded, stir

import qlora


def test_a_merged_model_is_saved_as_what_it_is(tmp_path):
    """Expects the merged model's logits after saving and loading."""
    llama().save_pretrained(tmp_path / "dense")
    model = reloaded(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())
    qlora.prepare_model(model, rank=4)
    stir(model)
    qlora.merge_and_unload(model)
    model.save_pretrained(tmp_path / "merged")
    assert difference(logits(reloaded(tmp_path / "merged")), logits(model)) < SAME


def test_weights_of_transposed_layers_are_saved_the_way_round_that_the_model_reads(tmp_path):
    """Expects the same logits after GPT-2 is loaded in 4 bit, dequantized, saved and loaded, or an error of dequantize
    that names Conv1D."""
    config = transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    model = reloaded(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())
    model = result_or_refusal(model.dequantize, "Conv1D")
    if model is not None:
        model.save_pretrained(tmp_path / "again")
        assert difference(logits(reloaded(tmp_path / "again")), logits(model)) < SAME


def test_what_peft_merges_by_itself_is_saved_as_what_it_is(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = reloaded(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    stir(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert difference(logits(reloaded(tmp_path / "merged")), logits(merged)) < SAME


def test_a_model_that_peft_has_merged_in_part_is_not_saved(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = reloaded(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match=r"only some layers in 4 bit.*qlora.merge_and_unload"):
        merged.save_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("kind", ["prepared", "peft"])
def test_a_merged_gpt2_is_saved_the_way_round_that_it_reads(tmp_path, kind):
    """With square weights, only the values show whether one is transposed."""
    config = transformers.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    model = reloaded(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())
    if kind == "prepared":
        qlora.prepare_model(model, rank=4)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"]))
    stir(model)
    wanted = logits(model)
    merged, _ = qlora.merge_and_unload(model, dtype=torch.float32)
    assert difference(logits(merged), wanted) < SAME
    merged.save_pretrained(tmp_path / "merged")
    assert difference(logits(reloaded(tmp_path / "merged")), wanted) < SAME


@pytest.mark.parametrize("kind", ["prepared", "peft"])
def test_requantized_layers_keep_their_settings(tmp_path, kind):
    llama().save_pretrained(tmp_path / "dense")
    options = qlora.QLoRAConfig(compute_dtype="bfloat16")
    model = reloaded(tmp_path / "dense", quantization_config=options)
    if kind == "prepared":
        qlora.prepare_model(model, rank=4)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    merged, _ = qlora.merge_and_unload(model, requantize=True)
    packed = [m for m in merged.modules() if isinstance(m, qlora.nn.Linear4bit)]
    assert len(packed) == 14
    assert all(m.compute_dtype == torch.bfloat16 and not m.training for m in packed)
    merged.save_pretrained(tmp_path / "again")
    assert difference(logits(reloaded(tmp_path / "again")), logits(merged)) < SAME


def test_dense_means_embeddings_and_experts_too():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)).eval()
    model.model.embed_tokens = qlora.nn.Embedding4bit.from_embedding(model.model.embed_tokens)
    report = qlora.prepare_model(model, rank=4)
    assert [name for name in report.quantized if name.endswith("experts")]
    wanted = logits(model)
    qlora.merge_and_unload(model)
    assert all(p.is_floating_point() for p in model.parameters())
    assert difference(logits(model), wanted) < 1e-3
