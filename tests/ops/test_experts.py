"""forward.experts: each row with the weight of its expert, compared with float64 and with one call for each expert."""

import oracle
import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, QUANT_TYPES
from tolerances import assert_within
from torch.library import opcheck

import qlora
from qlora import _C, ops, reference

# tokens, choices, experts, n, k. The last shapes have several tiles of rows for some experts and run on tensor cores.
SHAPES = [
    (0, 2, 3, 8, 64),
    (1, 1, 1, 5, 38),
    (5, 2, 3, 0, 64),
    (5, 2, 3, 40, 0),
    (40, 2, 3, 24, 1),
    (1, 3, 4, 33, 96),
    (6, 2, 5, 64, 128),
    (9, 1, 3, 17, 64),
    (50, 2, 4, 130, 100),
    (40, 4, 8, 72, 128),
    (70, 2, 3, 40, 64),
    (150, 2, 3, 136, 192),
]
DISTRIBUTIONS = ("spread", "one expert gets all", "some get none", "some on other processes")


def expert_weights(experts, n, k, quant_type="nf4", block_size=64, double_quant=True):
    """A stack of random quantized weights: (arguments for the operator, float64 dequantized [experts, n, k])."""
    parts = [qlora.quantize(torch.randn(n, k), quant_type, block_size, double_quant) for _ in range(experts)]
    stacked = [torch.stack([getattr(part, name) for part in parts]) for name in ("packed", "absmax")]
    nested = [
        torch.stack([getattr(part, name) for part in parts]) if double_quant else None
        for name in ("nested_absmax", "nested_offset")
    ]
    dense = torch.stack([part.dequantize(torch.float32).double() for part in parts])
    return (*stacked, *nested, [experts, n, k], quant_type, block_size), dense


def experts_of_rows(distribution, rows, experts):
    if distribution == "one expert gets all":
        return torch.full((rows,), experts - 1)
    if distribution == "some get none":
        return torch.randint(0, max(1, experts // 2), (rows,)) * 2 % experts
    if distribution == "some on other processes":
        return torch.randint(-1, experts + 2, (rows,))
    return torch.randint(0, experts, (rows,))


def make(tokens, choices, experts, n, k, r=3, dtype=torch.float32, distribution="spread"):
    weight, dense = expert_weights(experts, n, k)
    of_row = experts_of_rows(distribution, tokens * choices, experts)
    x, lora = torch.randn(tokens, k).to(dtype), (torch.randn(experts, r, k), torch.randn(experts, n, r), 0.7)
    return x, weight, dense, of_row, lora, torch.randn(experts, n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("r", "lora_dtype", "distribution"),
    [
        (None, None, "spread"),
        (3, "float32", "some on other processes"),
        (17, "that of x", "some get none"),
        (16, "that of x", "one expert gets all"),
    ],
)
def test_forward_and_gradients(device, r, lora_dtype, distribution, dtype, shape):
    x, weight, dense, of_row, lora, bias = make(*shape, r=r or 1, dtype=dtype, distribution=distribution)
    a, b, scaling = lora if r is not None else (None, None, 1.0)
    if lora_dtype == "that of x":
        a, b = a.to(dtype), b.to(dtype)
    grad = torch.randn(len(of_row), shape[3]).to(dtype)
    x_, a_, b_, bias_ = (None if t is None else t.clone().requires_grad_() for t in (x, a, b, bias))
    y = ops.forward_experts(x_, *weight, of_row, a_, b_, scaling, bias_)
    y.backward(grad)

    assert_within(y, *oracle.forward_experts(device, x, dense, of_row, a, b, scaling, bias))
    assert_within(x_.grad, *oracle.dx_experts(device, grad, dense, of_row, len(x), a, b, scaling))
    rows = x.repeat_interleave(shape[1], 0)
    largest = None
    if a is not None:  # of all rows, because float16 activations are scaled into range together
        known = (of_row >= 0) & (of_row < shape[2])
        expert = of_row.clamp(0, shape[2] - 1)
        largest = [
            (known[:, None] * scaling * torch.einsum("mi,mir->mr", t.double().abs(), f.double().abs()[expert])).amax()
            if len(of_row)
            else 0.0
            for t, f in ((grad, b), (rows, a.mT))
        ]
    for i in range(shape[2]):
        mine = of_row == i
        assert_within(bias_.grad[i], *oracle.bias_gradient(grad[mine]))
        if a is not None:
            answers = oracle.factor_gradients(device, grad[mine], rows[mine], a[i], b[i], scaling, largest)
            assert_within(a_.grad[i], *answers[0])
            assert_within(b_.grad[i], *answers[1])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_formats(device, quant_type, block_size, double_quant):
    weight, dense = expert_weights(3, 24, 192, quant_type, block_size, double_quant)
    x, of_row = torch.randn(20, 192), torch.randint(0, 3, (40,))
    x_ = x.clone().requires_grad_()
    y = ops.forward_experts(x_, *weight, of_row)
    assert_within(y, *oracle.forward_experts(device, x, dense, of_row))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_within(x_.grad, *oracle.dx_experts(device, grad, dense, of_row, len(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _C.runnable_isas())
def test_a_row_is_what_forward_gives_for_the_rows_of_its_expert(isa, dtype, monkeypatch):
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    x, weight, _, of_row, (a, b, scaling), bias = make(60, 2, 6, 72, 128, dtype=dtype, distribution="some get none")
    of_row[:3] = 5  # few rows: another kernel
    y = ops.forward_experts(x, *weight, of_row, a, b, scaling, bias)
    rows = x.repeat_interleave(2, 0)
    for i in range(6):
        mine = of_row == i
        one = [None if t is None else t[i] for t in weight[:4]]
        alone = ops.forward(rows[mine], *one, weight[4][1:], *weight[5:], a[i], b[i], scaling, bias[i])
        assert torch.equal(y[mine], alone)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_factors_in_the_layout_of_peft(device, lora_dtype):
    """lora_b is a view of [n, r * experts], not contiguous; some experts have no rows."""
    x, weight, _, of_row, (a, b, scaling), _ = make(30, 2, 6, 40, 64, distribution="some get none")
    a, b = a.to(lora_dtype), b.to(lora_dtype)
    stored = b.permute(1, 2, 0).reshape(40, -1).contiguous().requires_grad_()
    view = stored.reshape(-1, 6).t().unflatten(1, (40, -1))
    assert torch.equal(view, b)
    assert not view.is_contiguous()
    grad = torch.randn(60, 40)
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    expected = ops.forward_experts(x, *weight, of_row, *leaves, scaling)
    expected.backward(grad)
    y = ops.forward_experts(x, *weight, of_row, leaves[0], view, scaling)
    y.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(stored.grad.reshape(40, -1, 6).permute(2, 0, 1), leaves[1].grad)


def test_a_row_does_not_depend_on_the_values_of_others(device):
    x, weight, _, of_row, (a, b, scaling), bias = make(50, 2, 3, 40, 64, dtype=torch.bfloat16)
    y = ops.forward_experts(x, *weight, of_row, a, b, scaling, bias)
    other = x.clone()
    other[1:] = torch.inf
    assert torch.equal(ops.forward_experts(other, *weight, of_row, a, b, scaling, bias)[:2], y[:2])


@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_for_every_thread_count(device, dtype, tokens, threads):
    x, weight, _, of_row, (a, b, scaling), _ = make(tokens, 2, 4, 200, 96, dtype=dtype)
    grad = torch.randn(2 * tokens, 200).to(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = ops.forward_experts(leaves[0], *weight, of_row, *leaves[1:], scaling)
        y.backward(grad)
        results.append([y, *(t.grad for t in leaves)])
    assert all(torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True))


def test_reference_twin_and_leading_dimensions():
    x, weight, _, of_row, lora, bias = make(12, 2, 3, 20, 64)
    y = ops.forward_experts(x.view(3, 4, 64), *weight, of_row.view(3, 4, 2), *lora, bias)
    assert torch.allclose(y, reference.forward_experts(x, *weight, of_row, *lora, bias), rtol=1e-4, atol=1e-4)


def test_opcheck_compile_and_autocast():
    x, weight, _, of_row, (a, b, scaling), bias = make(5, 2, 3, 24, 64)
    leaves = [t.requires_grad_() for t in (x, a, b, bias)]
    arguments = (leaves[0], *weight, of_row, leaves[1], leaves[2], scaling, leaves[3])
    opcheck(torch.ops.qlora.forward.experts, arguments)
    opcheck(torch.ops.qlora.forward.experts, arguments[:9])
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments[:-1]]
    opcheck(torch.ops.qlora.backward.experts, (torch.randn(10, 24), *plain, True, True, True))
    compiled = torch.compile(ops.forward_experts, fullgraph=True)
    assert torch.equal(compiled(*arguments), ops.forward_experts(*arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.forward_experts(*arguments)
    assert torch.equal(y, ops.forward_experts(x.bfloat16(), *arguments[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [24, 64]}, r"shape has 2 dimensions: .* \(experts, out_features, in_features\)"),
        ({"shape": [3, 24, 64]}, "packed has 3072 bytes: a weight of 1536 elements needs 3 times 768"),
        ({"of_row": torch.zeros(5, dtype=torch.long)}, "expert_of_row has 5 values: x has 3 rows"),
        ({"of_row": torch.zeros(6)}, "expert_of_row has the wrong dtype: it must be int64"),
        ({"a": torch.randn(4, 3, 63)}, r"lora_a has shape .* experts=4 and in_features=64"),
        ({"b": torch.randn(4, 24, 2)}, r"lora_b has shape .* \[4, 24, 3\]"),
        ({"a": torch.randn(4, 0, 64)}, "rank=0"),
        ({"a": None}, "lora_b was given without lora_a"),
        ({"b": torch.randn(4, 24, 3).bfloat16()}, "same dtype"),
        ({"bias": torch.randn(24)}, r"bias has shape .* \[experts, out_features\] = \[4, 24\]"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    x, weight, _, of_row, (a, b, scaling), bias = make(3, 2, 4, 24, 64)
    values = {"shape": weight[4], "of_row": of_row, "a": a, "b": b, "bias": bias} | change
    weight = (*weight[:4], values["shape"], *weight[5:])
    with pytest.raises(RuntimeError, match=message):
        ops.forward_experts(x, *weight, values["of_row"], values["a"], values["b"], scaling, values["bias"])


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "nested_absmax", "expert_of_row", "bias"])
def test_tensors_on_several_devices_are_refused(name):
    x, weight, _, of_row, (a, b, scaling), bias = make(3, 1, 2, 24, 64)
    values = dict(zip(("packed", "absmax", "nested_absmax", "nested_offset"), weight[:4], strict=True))
    values |= {"expert_of_row": of_row, "lora_a": a, "lora_b": b, "bias": bias}
    values[name] = values[name].to("meta")
    form = {"shape": weight[4], "quant_type": weight[5], "block_size": weight[6], "scaling": scaling}
    with pytest.raises(RuntimeError, match="on one device"):
        ops.forward_experts(x, **values, **form)


def test_no_choices():
    x, weight, _, _, (a, b, scaling), _ = make(3, 1, 2, 24, 64)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = ops.forward_experts(x, *weight, torch.empty(3, 0, dtype=torch.long), a, b, scaling)
    assert y.shape == (0, 24)
    y.sum().backward()
    assert all(torch.count_nonzero(t.grad) == 0 for t in leaves)


def test_what_has_no_gradient_is_refused():
    x, weight, _, of_row, lora, _ = make(3, 1, 2, 24, 64)
    frozen = (weight[0], weight[1], weight[2].requires_grad_(), *weight[3:])
    with pytest.raises(RuntimeError, match="a 4-bit weight is frozen"):
        ops.forward_experts(x.requires_grad_(), *frozen, of_row)
    y = ops.forward_experts(x, *weight[:2], weight[2].detach(), *weight[3:], of_row, *lora)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
