"""The textbook form: integer weights, scale and zero point, alpha / r."""

import oracle
import pytest
import torch
from cases import DTYPES
from tolerances import accumulation, assert_within

from qlora import ops, reference

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def test_textbook_example(device):
    x = torch.tensor([[2.0, 1.0]])
    y = ops.forward_affine(
        x,
        torch.full((2, 2), 5, dtype=torch.int8),
        0.2,
        -0.5,
        torch.tensor([[0.1], [0.1]]),
        torch.tensor([[0.5, 0.5]]),
        2.0,
    )
    assert torch.allclose(y, torch.tensor([[1.8, 1.8]]), rtol=0, atol=4 * 2.0**-24 * 2)


GRIDS = {
    "scalar": lambda k, n: (torch.tensor(0.1), torch.tensor(-0.4)),
    "channel": lambda k, n: (torch.rand(n), torch.randn(n)),
    "group": lambda k, n: (torch.rand(k // 4, n), torch.randn(k // 4, n)),
    "group-only": lambda k, n: (torch.rand(k // 4, 1), torch.randn(k // 4, 1)),
}


@pytest.mark.parametrize("m", [0, 1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_forward_and_gradients(device, grid, dtype, m):
    k, n, r, alpha = 12, 19, 3, 2.0
    scale, zero = GRIDS[grid](k, n)
    q = torch.randint(-8, 8, (k, n), dtype=torch.int8)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    b, a = torch.randn(k, r), torch.randn(r, n)
    x_, b_, a_ = (t.clone().requires_grad_() for t in (x, b, a))
    y = ops.forward_affine(x_, q, scale, zero, b_, a_, alpha)
    y.backward(grad)

    x64, b64, a64, g = x.double(), b.double(), a.double(), grad.double()
    y64 = reference.forward_affine(x64, q, scale.double(), zero.double(), b64, a64, alpha)
    s = alpha / r
    rows = k // scale.shape[0] if scale.dim() == 2 else 1
    spread = (lambda t: t.repeat_interleave(rows, 0)) if scale.dim() == 2 else (lambda t: t)
    dense = q.double() * spread(scale.double()) + spread(zero.double())
    # q * scale and its sum with zero_point are rounded: two units of the larger one
    magnitude = q.double().abs() * spread(scale.double()).abs() + spread(zero.double()).abs()
    X, G, B, A = x64.abs(), g.abs(), b64.abs(), a64.abs()

    def check(actual, expected, bound):
        assert_within(actual, *oracle.rounded(expected, bound, actual.dtype))

    check(y, y64, accumulation(2 * k + r + 8, X @ (magnitude + s * B @ A)))
    check(x_.grad, g @ dense.T + s * g @ a64.T @ b64.T, accumulation(2 * n + r + 8, G @ (magnitude.T + s * A.T @ B.T)))
    check(b_.grad, s * x64.T @ (g @ a64.T), accumulation(m + n + 6, s * X.T @ (G @ A.T)))
    check(a_.grad, s * (x64 @ b64).T @ g, accumulation(m + k + 6, s * (X @ B).T @ G))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_integer_dtype(device, dtype):
    q = torch.randint(0, 100, (6, 5), dtype=dtype)
    x, b, a = torch.randn(4, 6), torch.randn(6, 2), torch.randn(2, 5)
    expected = ops.forward_affine(x, q.to(torch.int32), 0.1, 1.0, b, a, 1.0)
    assert torch.equal(ops.forward_affine(x, q, 0.1, 1.0, b, a, 1.0), expected)


def test_numbers_and_tensors_agree(device):
    q = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    x, b, a = torch.randn(4, 6), torch.randn(6, 2), torch.randn(2, 5)
    assert torch.equal(
        ops.forward_affine(x, q, 0.1, 1.0, b, a, 1.0),
        ops.forward_affine(x, q, torch.tensor([0.1]), torch.tensor([1.0]), b, a, 1.0),
    )


def test_bad_grids_name_the_rule():
    q = torch.zeros(6, 5, dtype=torch.int8)
    x, b, a = torch.randn(4, 6), torch.randn(6, 2), torch.randn(2, 5)
    with pytest.raises(RuntimeError, match="in_features=6 a multiple of groups"):
        ops.forward_affine(x, q, torch.rand(4, 5), torch.rand(4, 5), b, a, 1.0)
    with pytest.raises(RuntimeError, match="they must agree"):
        ops.forward_affine(x, q, torch.rand(5), torch.rand(1), b, a, 1.0)
    with pytest.raises(TypeError, match="both be numbers or both be tensors"):
        ops.forward_affine(x, q, 0.1, torch.rand(1), b, a, 1.0)
    with pytest.raises(RuntimeError, match="must be an integer tensor"):
        ops.forward_affine(x, torch.zeros(6, 5), 0.1, 0.0, b, a, 1.0)
    with pytest.raises(RuntimeError, match="rank=0"):
        ops.forward_affine(x, q, 0.1, 0.0, torch.empty(6, 0), torch.empty(0, 5), 1.0)
    with pytest.raises(RuntimeError, match="no gradient for them"):
        ops.forward_affine(x, q, torch.rand(5, requires_grad=True), torch.rand(5), b.requires_grad_(), a, 1.0)
