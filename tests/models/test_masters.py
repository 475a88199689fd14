"""Float32 parameters of trained 16-bit layers: copies, tied weights, files and merges of such a model."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import save_llama
from transformers import AutoModelForCausalLM

import qlora
from qlora.adapters.lora import add_lora
from qlora.adapters.masters import back_to_16_bit, train_in_float32

IDS = torch.arange(8)[None]


@pytest.fixture
def model(tmp_path):
    def load(modules_to_save, **changes):
        torch.manual_seed(0)
        config = qlora.QLoRAConfig()
        base = AutoModelForCausalLM.from_pretrained(
            save_llama(tmp_path), quantization_config=config, dtype=torch.bfloat16
        )
        if changes:
            adapted = get_peft_model(base, LoraConfig(modules_to_save=modules_to_save, **changes))
            train_in_float32(adapted)
            return adapted
        return add_lora(base, 4, modules_to_save=modules_to_save)

    return load


def test_the_arithmetic_is_that_of_16_bit(model):
    """Converting bf16 to float32 and back is exact, so nothing changes before a step."""
    trained = model(["lm_head", "norm"]).eval()
    logits = trained(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    back_to_16_bit(trained)
    assert torch.equal(trained(input_ids=IDS).logits, logits)
    assert {p.dtype for n, p in trained.named_parameters() if "modules_to_save" in n} == {torch.bfloat16}


def test_a_copy_computes_with_its_own_parameters(model):
    trained = model(["lm_head"])
    other = copy.deepcopy(trained)
    head = other.base_model.model.lm_head.modules_to_save.default
    head.weight.data.zero_()
    other(input_ids=IDS).logits.sum().backward()
    assert not other(input_ids=IDS).logits.any()
    assert trained(input_ids=IDS).logits.any()
    assert head.weight.grad.dtype == torch.float32
    assert head.weight.grad.any()
    assert trained.base_model.model.lm_head.modules_to_save.default.weight.grad is None


def test_a_replica_of_data_parallel_computes_with_its_own(model):
    head = model(["lm_head"]).base_model.model.lm_head.modules_to_save.default
    x = torch.randn(2, head.in_features, dtype=torch.bfloat16)
    expected = head(x)
    replica = head._replicate_for_data_parallel()
    replica._parameters["bias"] = None
    replica.weight = 2 * head.weight.detach()
    assert torch.equal(replica(x), 2 * expected)
    assert torch.equal(head(x), expected)
    assert replica.weight.dtype == torch.float32


def test_it_can_be_pickled(model):
    trained = model(["lm_head"])
    buffer = io.BytesIO()
    torch.save(trained.base_model.model.lm_head, buffer)
    buffer.seek(0)
    head = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 32, dtype=torch.bfloat16)
    assert torch.equal(head(x), trained.base_model.model.lm_head(x))


@pytest.mark.parametrize("names", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_parameters_that_modules_share_are_cast_in_all_of_them(model, names):
    trained = model(names, target_modules="all-linear", ensure_weight_tying=True)
    trained(input_ids=IDS, labels=IDS).loss.backward()
    shared = [p for n, p in trained.named_parameters() if "modules_to_save" in n]
    assert {p.dtype for p in shared} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in shared)


def test_merging_brings_them_back_to_16_bit(model):
    trained = model(["lm_head"]).eval()
    expected = trained(input_ids=IDS).logits
    merged = qlora.merge_and_unload(trained).model
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not merged.lm_head._forward_pre_hooks
    assert merged(input_ids=IDS).logits.shape == expected.shape


def test_an_error_in_the_layer_leaves_its_parameters_as_they_were(model):
    head = model(["lm_head"]).base_model.model.lm_head.modules_to_save.default
    with pytest.raises(RuntimeError):
        head(torch.zeros(2, 5, dtype=torch.bfloat16))
    assert head.weight.dtype == torch.float32
    assert isinstance(head.weight, torch.nn.Parameter)
