"""forward.multi: each row of a batch with its own adapter, compared with float64 and the single-adapter operator."""

import oracle
import pytest
import torch
from cases import DTYPES, weights
from tolerances import assert_within
from torch.library import opcheck

from qlora import _C, ops, reference

# The last shapes have several tiles of tokens and run on tensor cores.
SHAPES = [
    (1, 5, 37),
    (3, 33, 96),
    (8, 64, 128),
    (9, 17, 64),
    (50, 130, 100),
    (40, 72, 128),
    (70, 40, 64),
    (150, 136, 192),
]


def make(m, n, k, adapters=4, r=3, dtype=torch.float32, runs=False):
    """A batch with every adapter and the base alone; rows of an adapter are scattered, or consecutive with ``runs``."""
    weight, dense = weights(n, k)
    of_row = torch.arange(m) * (adapters + 1) // max(1, m) - 1 if runs else torch.arange(m) % (adapters + 1) - 1
    lora = torch.randn(adapters, r, k), torch.randn(adapters, n, r), torch.randn(adapters), of_row
    return torch.randn(m, k).to(dtype), weight, dense, lora


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("r", "runs", "lora_dtype", "adapters"),
    # on tiles few adapters are steps of the product, and many are grouped
    [(3, False, "float32", 4), (17, True, "that of x", 2), (5, False, "that of x", 13)],
)
def test_forward_and_gradients(device, r, runs, lora_dtype, adapters, dtype, shape):
    m, n, k = shape
    x, weight, dense, (a, b, s, of_row) = make(m, n, k, adapters, r=r, dtype=dtype, runs=runs)
    if lora_dtype != "float32":
        a, b = a.to(dtype), b.to(dtype)
    bias, grad = torch.randn(n), torch.randn(m, n).to(dtype)
    x_, a_, b_, bias_ = (t.clone().requires_grad_() for t in (x, a, b, bias))
    y = ops.forward_multi(x_, *weight, a_, b_, s, of_row, bias_)
    y.backward(grad)

    assert_within(y, *oracle.forward_multi(device, x, dense, a, b, s, of_row, bias))
    assert_within(x_.grad, *oracle.dx_multi(device, grad, dense, a, b, s, of_row))
    assert_within(bias_.grad, *oracle.bias_gradient(grad))
    scale = (s.double().abs()[of_row] * (of_row >= 0))[:, None]
    largest = [
        (scale * torch.einsum("mi,mir->mr", tokens.double().abs(), factor.double().abs()[of_row])).max()
        for tokens, factor in ((grad, b), (x, a.mT))
    ]
    for i in range(len(a)):
        mine = grad[of_row == i], x[of_row == i], a[i], b[i], s[i].item()
        answer_a, answer_b = oracle.factor_gradients(device, *mine, largest)
        assert_within(a_.grad[i], *answer_a)
        assert_within(b_.grad[i], *answer_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_are_computed_in_slices(device, dtype):
    x, weight, dense, (a, b, s, of_row) = make(2100, 24, 64, adapters=13, dtype=dtype)
    bias = torch.randn(24)
    y = ops.forward_multi(x, *weight, a, b, s, of_row, bias)
    assert_within(y, *oracle.forward_multi(device, x, dense, a, b, s, of_row, bias))


@pytest.mark.parametrize("m", [1, 8, 9, 60])
def test_one_adapter_for_all_rows_is_the_single_adapter_operator(device, m):
    x, weight, _, (a, b, s, _) = make(m, 40, 96)
    y = ops.forward_multi(x, *weight, a, b, s, torch.full((m,), 2))
    assert torch.equal(y, ops.forward(x, *weight, a[2], b[2], s[2].item()))
    base = ops.forward_multi(x, *weight, a, b, s, torch.full((m,), -1))
    assert torch.equal(base, ops.forward(x, *weight))


@pytest.mark.parametrize("m", [9, 60, 200])
@pytest.mark.parametrize("isa", _C.runnable_isas())
def test_a_row_is_what_it_is_with_one_adapter_for_all(isa, m, monkeypatch):
    """Whichever rows stand beside it, and wherever its group begins in a tile; groups have more than two rows."""
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    x, weight, _, (a, b, s, of_row) = make(m, 40, 96)
    x.requires_grad_()
    y = ops.forward_multi(x, *weight, a, b, s, of_row)
    dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    for i in range(-1, len(a)):
        alone = ops.forward_multi(x, *weight, a, b, s, torch.full((m,), i))
        mine = of_row == i
        assert torch.equal(y[mine], alone[mine])
        assert torch.equal(dx[mine], torch.autograd.grad(alone, x, torch.ones_like(y))[0][mine])


@pytest.mark.parametrize("m", [6, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_for_every_thread_count(device, dtype, m, threads):
    x, weight, _, lora = make(m, 200, 96, dtype=dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ops.forward_multi(x, *weight, *lora))
    assert all(torch.equal(result, results[0]) for result in results)


def test_reference_twin_and_leading_dimensions():
    x, weight, _, lora = make(12, 20, 64)
    y = ops.forward_multi(x.view(3, 4, 64), *weight, *lora)
    assert torch.allclose(y, reference.forward_multi(x.view(3, 4, 64), *weight, *lora), rtol=1e-4, atol=1e-4)


def test_opcheck_compile_and_autocast():
    x, weight, _, (a, b, s, of_row) = make(5, 24, 64)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    arguments = (leaves[0], *weight, leaves[1], leaves[2], s, of_row, torch.randn(24, requires_grad=True))
    opcheck(torch.ops.qlora.forward.multi, arguments)
    opcheck(torch.ops.qlora.forward.multi, arguments[:-1])
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments[:-1]]
    opcheck(torch.ops.qlora.backward.multi, (torch.randn(5, 24), *plain, True, True, True))
    compiled = torch.compile(ops.forward_multi, fullgraph=True)
    assert torch.equal(compiled(*arguments), ops.forward_multi(*arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.forward_multi(*arguments)
    assert torch.equal(y, ops.forward_multi(x.bfloat16(), *arguments[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of_row": torch.tensor([0, 4, 0])}, r"adapter_of_row\[1\]=4: it must be -1 \(base only\) or .* 0 to 3"),
        ({"of_row": torch.tensor([0, -2, 0])}, r"adapter_of_row\[1\]=-2"),
        ({"of_row": torch.zeros(2, dtype=torch.long)}, "adapter_of_row has 2 values: x has 3 rows"),
        ({"of_row": torch.zeros(3)}, "adapter_of_row has the wrong dtype: it must be int64"),
        ({"s": torch.randn(3)}, "scaling has 3 values: there are 4 adapters"),
        ({"a": torch.randn(4, 3, 63)}, "lora_a has shape .* in_features=64"),
        ({"b": torch.randn(4, 24, 2)}, r"lora_b has shape .* \[4, 24, 3\]"),
        ({"a": torch.randn(4, 0, 64)}, "rank=0"),
        ({"b": torch.randn(4, 24, 3).bfloat16()}, "same dtype"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    x, weight, _, (a, b, s, of_row) = make(3, 24, 64)
    values = {"a": a, "b": b, "s": s, "of_row": of_row} | change
    with pytest.raises(RuntimeError, match=message):
        ops.forward_multi(x, *weight, values["a"], values["b"], values["s"], values["of_row"])


def test_a_damaged_adapter_never_reaches_the_rows_of_others():
    """With few rows, only the damaged adapter's rows are not finite. With many rows, the batch is refused unless all
    rows use that adapter."""
    for m in (6, 40):
        x, weight, _, (a, b, s, _) = make(m, 24, 64)
        b[1, 3, 0] = float("inf")
        of_row = torch.zeros(m, dtype=torch.long)
        of_row[-1] = 1
        if m == 6:
            y = ops.forward_multi(x, *weight, a, b, s, of_row)
            assert y[:-1].isfinite().all()
        else:
            with pytest.raises(RuntimeError, match=r"lora_b\[1\] holds nan or inf"):
                ops.forward_multi(x, *weight, a, b, s, of_row)
        assert not ops.forward_multi(x, *weight, a, b, s, torch.ones_like(of_row)).isfinite().all()
    x, weight, _, (a, b, s, of_row) = make(6, 24, 64)
    a[1, 0, 0] = float("nan")
    y = ops.forward_multi(x.requires_grad_(), *weight, a, b, s, of_row)
    with pytest.raises(RuntimeError, match=r"lora_a\[1\] holds nan or inf"):
        y[of_row != 1].sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [2, 13])
def test_a_damaged_row_reaches_no_gradient_of_another_adapter(device, adapters, dtype, bad):
    """Neither a token nor the gradient of one that is not finite, of an adapter or of the base alone."""
    x, weight, _, (a, b, s, of_row) = make(70, 40, 64, adapters, dtype=dtype)

    def gradients(x, grad):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        return torch.autograd.grad(ops.forward_multi(x, *weight, *leaves, s, of_row), leaves, grad)

    grad = torch.randn(70, 40).to(dtype)
    expected = gradients(x, grad)
    base, damaged = of_row.tolist().index(-1), of_row.tolist().index(1)
    for row, hit in ((base, []), (damaged, [1])):
        spoiled_x, spoiled_grad = x.clone(), grad.clone()
        spoiled_x[row, 5], spoiled_grad[row, 7] = bad, bad
        intact = [i for i in range(adapters) if i not in hit]
        for actual in (gradients(spoiled_x, grad), gradients(x, spoiled_grad)):
            for given, right in zip(actual, expected, strict=True):
                # On a GPU all float16 activations share a power of two, which is 1 beside one that is not finite.
                near = 2.0**-20 if dtype == torch.float16 and not device.startswith("cpu") else 0.0
                assert ((given[intact] - right[intact]).abs() <= near * right[intact].abs().max()).all()
        for i in hit:
            assert not gradients(spoiled_x, grad)[0][i].isfinite().all()
            assert not gradients(x, spoiled_grad)[1][i].isfinite().all()


def test_the_backward_in_inference_mode(threads):
    threads(2)
    x, weight, _, lora = make(70, 40, 64, adapters=6)
    arguments = torch.randn(70, 40), x, *weight, *lora, True, True, True
    expected = torch.ops.qlora.backward.multi(*arguments)
    with torch.inference_mode():
        assert all(map(torch.equal, torch.ops.qlora.backward.multi(*arguments), expected))


def test_an_empty_batch_has_zero_gradients_for_every_adapter(device):
    x, weight, _, lora = make(0, 24, 64)
    leaves = [t.requires_grad_() for t in lora[:2]]
    ops.forward_multi(x, *weight, *lora).sum().backward()
    assert not any(t.grad.any() for t in leaves)
