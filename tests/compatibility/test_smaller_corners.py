"""Regression tests for smaller faults, one test each."""

from dataclasses import asdict

import pytest
import torch
import transformers
from compatibility.refusals import result_or_refusal
from tiny_models import SIZES, TOKENS, llama, reloaded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qlora


def test_experts_that_prepare_model_leaves_dense_are_reported():
    """Expects 4-bit 3-D expert weights, their module among the skipped ones in the report, or a ValueError that names
    it."""
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))
    report = result_or_refusal(lambda: qlora.prepare_model(model, rank=4), "experts")
    if report is not None:
        dense = [name for name, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point()]
        fields = [value for field, value in asdict(report).items() if field != "quantized" and isinstance(value, tuple)]
        told = [name for names in fields for name in names if "experts" in name]
        assert not [name for name in dense if not any(name.startswith(module) for module in told)]


def test_a_negative_id_is_an_error_as_in_torch():
    """Expects an IndexError, as nn.Embedding raises, or a ValueError."""
    table = qlora.nn.Embedding4bit.from_embedding(nn.Embedding(10, 64))
    with pytest.raises((IndexError, ValueError)):
        table(torch.tensor([3, -1]))


def test_a_double_quantized_embedding_compiles_into_one_graph():
    """Expects it to compile with fullgraph=True and return the same rows, as documented for whole models."""
    table, ids = qlora.nn.Embedding4bit.from_embedding(nn.Embedding(50, 64)), torch.arange(8)
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), table(ids))


def test_a_string_for_skip_modules_is_one_name(tmp_path):
    """Expects only the layers of that name to stay dense, or an error of QLoRAConfig that names the option."""
    llama().save_pretrained(tmp_path)

    def load():
        return reloaded(tmp_path, quantization_config=qlora.QLoRAConfig(skip_modules="q_proj"))

    model = result_or_refusal(load, "skip_modules")
    if model is not None:
        dense = {name.rpartition(".")[2] for name, layer in model.named_modules() if type(layer) is nn.Linear}
        assert dense == {"q_proj", "lm_head"}


def test_an_average_of_weights_leaves_packed_ones_as_they_are():
    """Expects the packed base of an exponential moving average to equal the model's, or an error of update_parameters
    that names packed or 4-bit weights."""
    model = llama()
    qlora.prepare_model(model, rank=4)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))

    def update():
        for _ in range(3):
            average.update_parameters(model)

    if result_or_refusal(update, "packed", "4 bit", "4-bit", "uint8") is not None:
        averaged, state = average.module.state_dict(), model.state_dict()
        packed = [name for name, tensor in state.items() if tensor.dtype == torch.uint8]
        assert packed
        assert [name for name in packed if not torch.equal(averaged[name], state[name])] == []


def test_a_model_prepared_under_inference_mode_trains_afterwards():
    """Expects it to train, or an error of prepare_model that names inference_mode."""
    model = llama()

    def prepare():
        with torch.inference_mode():
            return qlora.prepare_model(model, rank=4)

    if result_or_refusal(prepare, "inference_mode", "inference mode") is not None:
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()


def test_the_floating_point_operations_of_a_layer_are_counted():
    """Expects the FLOPs of the matmul that it computes: 2 · tokens · in · out."""
    layer = qlora.nn.Linear4bit.from_linear(nn.Linear(64, 32))
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 64))
    assert counter.get_total_flops() == 2 * 3 * 64 * 32


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}, {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.5)}])
def test_every_kind_of_average_averages_adapters_alone(options):
    model = llama()
    qlora.prepare_model(model, rank=4)
    average = torch.optim.swa_utils.AveragedModel(model, **options)
    name = "model.layers.0.mlp.up_proj.lora_a.default"
    before = model.get_parameter(name).detach().clone()
    average.update_parameters(model)
    with torch.no_grad():
        model.get_parameter(name).add_(2)
    average.update_parameters(model)
    torch.testing.assert_close(average.module.get_parameter(name), before + 1)
    assert average.n_averaged == 2
    state = model.state_dict()
    assert all(
        torch.equal(t, state[n])
        for n, t in average.module.state_dict().items()
        if not n.startswith("n_") and t.dtype == torch.uint8
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_operations_of_forward_and_backward_are_counted(bias, double_quant):
    m, n, k, r = 3, 32, 64, 4
    layer = qlora.nn.QLoRALinear(nn.Linear(k, n, bias), r, double_quant=double_quant)
    x = torch.randn(m, k, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * m * (n * k + r * (n + k))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * m * (n * k + r * (n + k) + r * (n + 2 * k))


def test_operations_of_layers_with_one_input_are_counted():
    m, k, r = 12, 64, 4
    block = nn.Module()
    block.gate_proj, block.up_proj = qlora.nn.QLoRALinear(nn.Linear(k, 32), r), qlora.nn.Linear4bit(k, 16)
    block.forward = lambda x: block.gate_proj(x).sum() + block.up_proj(x).sum()
    assert qlora.nn.share_inputs(block) == 1
    with FlopCounterMode(display=False) as counter:
        y = block(torch.randn(m, k, requires_grad=True))
    assert counter.get_total_flops() == 2 * m * (32 * k + 16 * k + r * (32 + k))
    with FlopCounterMode(display=False) as counter:
        y.backward()
    assert counter.get_total_flops() == 2 * m * (32 * k + 16 * k + r * (32 + k) + r * (32 + 2 * k))


def test_layers_made_under_inference_mode_are_ordinary_ones():
    dense, table = nn.Linear(64, 32), nn.Embedding(8, 64)
    with torch.inference_mode():
        layers = [
            qlora.nn.Linear4bit.from_linear(dense),
            qlora.nn.Embedding4bit.from_embedding(table),
            qlora.nn.QLoRALinear(dense, 4),
        ]
        layers[2].add_adapter("second", 4)
    assert not [n for layer in layers for n, t in layer.state_dict().items() if t.is_inference()]


@pytest.mark.parametrize("option", ["skip_modules", "target_modules"])
def test_prepare_model_takes_no_string_for_a_list_of_names(option):
    with pytest.raises(ValueError, match=rf"{option}='q_proj' must be a list"):
        qlora.prepare_model(llama(), rank=4, **{option: "q_proj"})


def test_a_name_in_skip_modules_that_matches_nothing_is_told(tmp_path, caplog):
    llama().save_pretrained(tmp_path)
    reloaded(tmp_path, quantization_config=qlora.QLoRAConfig(skip_modules=["q_proj", "no_such_layer"]))
    assert "'no_such_layer' matches no module" in caplog.text
    assert "'q_proj' matches" not in caplog.text


@pytest.mark.parametrize("double_quant", [False, True])
def test_an_embedding_in_4_bit_gives_the_rows_of_its_table(double_quant):
    table = qlora.nn.Embedding4bit.from_embedding(nn.Embedding(10, 128), double_quant=double_quant)
    ids = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(table(ids), table.dequantize()[ids])
    for bad in (10, -1):
        with pytest.raises((IndexError, ValueError)):
            table(torch.tensor([bad]))
