"""Bad input raises an error with the value and the rule."""

import pytest
import torch
from cases import weights

import qlora
from qlora import _C, ops


def call(x=None, lora_a=None, lora_b=None, bias=None, lora_x=None, **changes):
    (packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size), _ = weights(8, 64)
    arguments = {
        "packed": packed,
        "absmax": absmax,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
        "shape": shape,
        "quant_type": quant_type,
        "block_size": block_size,
    } | changes
    x = torch.randn(2, 64) if x is None else x
    return ops.forward(x, **arguments, lora_a=lora_a, lora_b=lora_b, bias=bias, lora_x=lora_x)


A, B = torch.randn(2, 64), torch.randn(8, 2)

CASES = {
    "features": (lambda: call(torch.randn(2, 63)), r"x has shape \[2, 63\]: its last dimension must be in_features=64"),
    "dtype": (lambda: call(torch.randn(2, 64).double()), "x must be float32, bfloat16 or float16"),
    "packed length": (lambda: call(packed=torch.zeros(3, dtype=torch.uint8)), "packed has 3 bytes: .* needs 256"),
    "packed dtype": (lambda: call(packed=torch.zeros(256)), "packed has the wrong dtype: it must be uint8"),
    "absmax length": (lambda: call(absmax=torch.zeros(3, dtype=torch.uint8)), "absmax has 3 values: .* need 8"),
    "absmax dtype": (lambda: call(absmax=torch.zeros(8)), "absmax has the wrong dtype: it must be uint8 with double"),
    "absmax codes alone": (
        lambda: call(nested_absmax=None, nested_offset=None),
        "absmax must be float32 without double quantization",
    ),
    "nested length": (lambda: call(nested_absmax=torch.zeros(2)), "nested_absmax has 2 values: .* need 1"),
    "nested alone": (lambda: call(nested_offset=None), "belong together"),
    "quant_type": (lambda: call(quant_type="nf3"), "quant_type='nf3' is unknown: use one of nf4, fp4, int4"),
    "block size": (lambda: call(block_size=48), "block_size=48 must be a power of two from 32 to 4096"),
    "shape": (lambda: call(shape=[8, 8, 8]), "shape has 3 dimensions"),
    "overflowing shape": (lambda: call(shape=[2**60, 64]), "more than 2\\^63 elements"),
    "negative shape": (lambda: call(shape=[-8, 64]), "must not be negative"),
    "a without b": (lambda: call(lora_a=A), "lora_a was given without lora_b"),
    "b without a": (lambda: call(lora_b=B), "lora_b was given without lora_a"),
    "rank 0": (lambda: call(lora_a=torch.empty(0, 64), lora_b=torch.empty(8, 0)), "rank=0"),
    "rank mismatch": (lambda: call(lora_a=A, lora_b=torch.randn(8, 3)), r"lora_b has shape \[8, 3\].*\[8, 2\]"),
    "lora_a features": (lambda: call(lora_a=torch.randn(2, 63), lora_b=B), r"lora_a has shape \[2, 63\].*\[2, 64\]"),
    "lora dtypes": (lambda: call(lora_a=A.bfloat16(), lora_b=B), "same dtype"),
    "bias": (lambda: call(bias=torch.randn(7)), r"bias has shape \[7\]: it must be \[out_features\] = \[8\]"),
    "lora_x alone": (lambda: call(lora_x=torch.randn(2, 64)), "lora_x was given without"),
    "lora_x shape": (lambda: call(lora_a=A, lora_b=B, lora_x=torch.randn(3, 64)), "must have the shape and dtype of x"),
    "quantize dtype": (lambda: ops.quantize(torch.ones(64, dtype=torch.int32)), "weight must be float32"),
    "quantize block": (lambda: ops.quantize(torch.ones(64), block_size=8192), "block_size=8192 must be a power of two"),
    "quantize type": (lambda: ops.quantize(torch.ones(64), "fp8"), "quant_type='fp8' is unknown"),
    "dequantize dtype": (
        lambda: qlora.quantize(torch.ones(64)).dequantize(torch.float64),
        "dtype must be float32, bfloat16 or float16",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error_names_value_and_rule(name):
    function, message = CASES[name]
    with pytest.raises(RuntimeError, match=message):
        function()


def test_tensors_on_two_devices():
    """A meta tensor serves as a tensor on a second device."""
    weight, _ = weights(8, 64)
    with pytest.raises(RuntimeError, match="must be on one device"):
        ops.forward(torch.randn(2, 64, device="meta"), *weight)
    with pytest.raises(RuntimeError, match="must be on one device"):
        ops.forward(torch.randn(2, 64), weight[0], weight[1].to("meta"), *weight[2:])


def test_negative_scaling_is_allowed():
    weight, _ = weights(8, 64)
    x = torch.randn(2, 64)
    plus, minus = (ops.forward(x, *weight, A, B, s) for s in (1.0, -1.0))
    assert torch.allclose((plus + minus) / 2, ops.forward(x, *weight), atol=1e-4)


def test_unknown_isa(monkeypatch):
    monkeypatch.setenv("QLORA_CPU_ISA", "avx1024")
    with pytest.raises(RuntimeError, match="QLORA_CPU_ISA='avx1024' is unknown"):
        ops.quantize(torch.ones(64))
    with pytest.raises(ValueError, match="avx1024"):
        _C.active_isa()


def test_explain_refuses_a_rank_below_one():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        qlora.explain(torch.randn(1, 64), qlora.quantize(torch.randn(8, 64)), rank=0)


def test_explain_names_the_slower_path_and_its_reason(monkeypatch):
    monkeypatch.delenv("QLORA_CPU_ISA", raising=False)
    fast = qlora.explain(torch.randn(1, 64), qlora.quantize(torch.randn(8, 64)))
    assert (fast.kernel, fast.why_not_faster, fast.low_rank) == ("gemv_words", "", "dot")
    slow = qlora.explain(torch.randn(2, 3, 100), qlora.quantize(torch.randn(8, 100)))
    assert slow.kernel == "gemv_elements"
    assert "multiple of 32" in slow.why_not_faster
    many = qlora.explain(torch.randn(3, 3, 100), qlora.quantize(torch.randn(8, 100)))
    assert (many.kernel, many.low_rank) == ("gemm", "gemm")
    assert "float32" in many.why_not_faster
    bfloat = qlora.explain(torch.randn(33, 100).bfloat16(), qlora.quantize(torch.randn(8, 100)))
    if _C.active_isa() in ("amx", "avx512bf16", "neonbf16"):
        assert (bfloat.kernel, bfloat.why_not_faster, bfloat.backward) == ("tiles", "", "tiles")
        assert "bfloat16 products" in bfloat.compute
    else:
        assert (bfloat.kernel, bfloat.backward) == ("gemm", "gemm")
        assert "AMX" in bfloat.why_not_faster
    with pytest.raises(ValueError, match="they must be"):
        qlora.explain(torch.zeros(()), qlora.quantize(torch.randn(8, 64)))
    if len(_C.runnable_isas()) > 1:
        monkeypatch.setenv("QLORA_CPU_ISA", "scalar")
        capped = qlora.explain(torch.randn(1, 64), qlora.quantize(torch.randn(8, 64)))
        assert "QLORA_CPU_ISA chooses scalar" in capped.why_not_faster
    with pytest.raises(ValueError, match="63 features"):
        qlora.explain(torch.randn(1, 63), qlora.quantize(torch.randn(8, 64)))


def test_numbers_that_require_grad_are_refused():
    """torch would turn them into numbers, and their gradients would be lost."""
    x, scaling = torch.randn(3, 64), torch.tensor(0.5, requires_grad=True)
    weight, _ = weights(24, 64)
    a, b = torch.randn(2, 64), torch.randn(24, 2)
    stacks = [[t] for t in weight[:4]]
    calls = {
        "forward": lambda s: ops.forward(x, *weight, a, b, s),
        "forward_many": lambda s: ops.forward_many(x, *stacks, [24], "nf4", 64, [a], [b], [s])[0],
        "forward_experts": lambda s: ops.forward_experts(
            x, *stacked, [1, 24, 64], "nf4", 64, torch.zeros(3, dtype=torch.int64), a[None], b[None], s
        ),
        "forward_affine": lambda s: ops.forward_affine(x, torch.ones(64, 24, dtype=torch.int8), 0.1, 0.0, a.T, b.T, s),
    }
    stacked = [t[None] for t in weight[:4]]
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="(scaling|alpha) requires grad.*detach it"):
            call(scaling)
        assert torch.equal(call(scaling.detach()), call(0.5)), name
