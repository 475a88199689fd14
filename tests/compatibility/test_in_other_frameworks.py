"""The layers under torch.func, transformers' Trainer, accelerate's offloading and PEFT's own code."""

import accelerate
import peft
import pytest
import torch
import transformers
from compatibility.refusals import result_or_refusal
from tiny_models import SAME, TOKENS, difference, llama, logits, reloaded
from torch import nn
from torch.autograd import forward_ad

import qlora


@pytest.fixture
def packed_llama(tmp_path):
    """A Llama that transformers loaded in 4 bit."""
    llama().save_pretrained(tmp_path / "dense")
    return reloaded(tmp_path / "dense", quantization_config=qlora.QLoRAConfig())


def test_forward_mode_derivative_is_not_silently_zero():
    """Expects the linear map of the tangent, or an error that names forward mode or jvp."""
    layer = qlora.nn.Linear4bit.from_linear(nn.Linear(64, 32, bias=False))
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    result = result_or_refusal(lambda: torch.func.jvp(layer, (x,), (tangent,)), "forward mode", "forward ad", "jvp")
    if result is not None:
        torch.testing.assert_close(result[1], layer(tangent), rtol=1e-4, atol=1e-4)


def test_trainer_trains_the_adapters_of_a_model_loaded_in_4_bit(packed_llama, tmp_path):
    """Expects training to work, as documented."""
    qlora.prepare_model(packed_llama, rank=4)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
    )
    data = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    transformers.Trainer(packed_llama, arguments, train_dataset=data).train()
    assert all(p.any() for name, p in packed_llama.named_parameters() if "lora_b" in name)


def test_adapted_layers_run_while_accelerate_keeps_their_base_elsewhere():
    """Expects the same logits as without offloading."""
    model = llama()
    qlora.prepare_model(model, rank=4)
    wanted = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert difference(logits(model), wanted) < SAME


def test_forward_hooks_on_the_parts_of_a_peft_layer_fire(packed_llama):
    """Expects each hook to run once per forward, as in PEFT's own layers, or an error that names hooks."""
    model = peft.get_peft_model(packed_llama, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    layer, calls = model.base_model.model.model.layers[0].self_attn.q_proj, []
    parts = {"base_layer": layer.base_layer, "lora_A": layer.lora_A["default"], "lora_B": layer.lora_B["default"]}
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    if result_or_refusal(lambda: logits(model), "hook") is not None:
        assert sorted(calls) == sorted(parts)


def test_peft_counts_the_parameters_of_a_packed_base_as_those_of_the_dense_one(packed_llama):
    """Expects the numbers of the dense model."""
    options = peft.LoraConfig(r=4, target_modules="all-linear")
    ours, dense = peft.get_peft_model(packed_llama, options), peft.get_peft_model(llama(), options)
    assert ours.get_nb_trainable_parameters() == dense.get_nb_trainable_parameters()


def test_nested_offset_in_16_bit_is_taken_by_accelerated_operators():
    """Some checkpoints store the nested offset in 16 bit; bitsandbytes reads it as float32."""
    bnb = pytest.importorskip("bitsandbytes")
    from qlora.integrations import bitsandbytes as ours

    torch.manual_seed(0)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(
        torch.randn(64, 128), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    handle = ours.accelerate()
    try:
        results = []
        for offset in (state.offset.bfloat16(), state.offset.bfloat16().float()):
            results.append(
                torch.ops.bitsandbytes.gemm_4bit.default(
                    x,
                    packed,
                    [64, 128],
                    state.state2.absmax,
                    64,
                    "nf4",
                    absmax_8bit=state.absmax,
                    absmax_code=state.state2.code,
                    absmax_offset=offset,
                )
            )
    finally:
        handle.undo()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("operator", ["forward", "forward_multi", "forward_affine"])
def test_every_operator_refuses_forward_mode(operator):
    weight = qlora.quantize(torch.randn(32, 64))
    parts = weight.arguments
    a, b = torch.randn(1, 4, 64), torch.randn(1, 32, 4)
    q = torch.randint(0, 16, (64, 32))
    call = {
        "forward": lambda x: qlora.ops.forward(x, *parts),
        "forward_multi": lambda x: qlora.ops.forward_multi(
            x, *parts, a, b, torch.ones(1), torch.zeros(3, dtype=torch.int64)
        ),
        "forward_affine": lambda x: qlora.ops.forward_affine(x, q, 0.1, 0.0, torch.randn(64, 4), torch.randn(4, 32), 1),
    }[operator]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(forward_ad.make_dual(torch.randn(3, 64), torch.randn(3, 64)))


def test_adapters_kept_elsewhere_are_not_trained_in_vain():
    model = llama()
    qlora.prepare_model(model, rank=4)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model(input_ids=TOKENS)


def test_peft_layers_run_while_accelerate_keeps_their_base_elsewhere(packed_llama):
    model = peft.get_peft_model(packed_llama, peft.LoraConfig(r=4, target_modules="all-linear"))
    wanted = logits(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert difference(logits(model), wanted) < SAME


def test_transformers_counts_the_parameters_of_packed_layers(packed_llama):
    dense = llama()
    assert packed_llama.num_parameters() == dense.num_parameters()
    qlora.prepare_model(packed_llama, rank=4)
    adapters = sum(p.numel() for p in packed_llama.parameters() if p.requires_grad)
    assert packed_llama.num_parameters() == dense.num_parameters() + adapters
    assert packed_llama.num_parameters(only_trainable=True) == adapters


@pytest.mark.parametrize("name", ["absmax", "nested_absmax"])
def test_statistics_in_16_bit_are_read_as_float32(name):
    weight = qlora.quantize(torch.randn(64, 128), double_quant=name == "nested_absmax")
    entries = weight.to_bnb()
    entries[f"weight.{name}"] = entries[f"weight.{name}"].bfloat16()
    again = qlora.QuantizedWeight.from_bnb(entries)
    assert getattr(again, name).dtype == torch.float32
    assert torch.equal(getattr(again, name), getattr(weight, name).bfloat16().float())
