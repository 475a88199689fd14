"""The library does not depend on the default dtype or device of the process."""

import pytest
import torch
import transformers

import qlora
from qlora.models.loading import load_quantized
from qlora.nn.merging import requantize


@pytest.fixture
def bfloat16_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_adamw_counts_steps_past_256_under_a_bfloat16_default(bfloat16_default):
    """Expects the step counter and the parameter of torch.optim.AdamW."""
    steps, values = [], []
    for kind in (torch.optim.AdamW, qlora.optim.PagedAdamW):
        parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float32))
        optimizer = kind([parameter], lr=1e-3, weight_decay=0.0)
        for _ in range(400):
            parameter.grad = torch.full_like(parameter, 0.1)
            optimizer.step()
        steps.append(float(optimizer.state[parameter]["step"]))
        values.append(parameter.detach())
    assert steps == [400.0, 400.0]
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)


def test_position_table_of_a_streamed_model_is_not_rounded_to_bfloat16_while_it_is_computed(tmp_path):
    """Expects the table of float32 arithmetic, rounded at most once to the compute dtype."""
    config = transformers.GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=2048, rotary_dim=16)
    dense = transformers.GPTJForCausalLM(config)
    dense.save_pretrained(tmp_path)
    model, _ = load_quantized(tmp_path, torch.bfloat16, rank=None, progress=False)
    tables = {name: table for name, table in dense.named_buffers() if "embed_positions" in name}
    assert tables
    for name, table in tables.items():
        assert (model.get_buffer(name).float() - table).abs().max() < 0.005


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_every_table_and_statistic_is_that_of_a_process_with_the_usual_defaults(quant_type, double_quant):
    """With the default device "meta", a tensor created without an explicit device has no data, and its use fails."""

    def everything():
        torch.manual_seed(0)
        dense = torch.randn(32, 64, dtype=torch.float32, device="cpu")
        weight = qlora.quantize(dense, quant_type, 32, double_quant)
        again = requantize(dense, weight, search_scales=True)
        table = qlora.nn.Embedding4bit.from_embedding(
            torch.nn.Embedding(32, 64, _weight=dense), quant_type, double_quant, 32
        )
        reference = qlora.reference.quantize(dense, quant_type, 32, double_quant)
        results = [*weight.tensors, *again.tensors, *reference, weight.dequantize(), again.dequantize()]
        results += [table(torch.tensor([3, 1], device="cpu"))]
        if quant_type != "int4":
            results += qlora.QuantizedWeight.from_bnb(weight.to_bnb()).tensors
        layer = qlora.nn.QLoRALinear(torch.nn.Linear(64, 32, bias=False, device="cpu", dtype=torch.float32), 4)
        results += [torch.tensor(layer.merge(requantize=True, search_scales=True).relative_error > 0, device="cpu")]
        return results

    wanted = everything()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
