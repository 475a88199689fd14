"""Gradients of the fused operation against float64, with derived tolerances."""

import oracle
import pytest
import torch
from cases import DTYPES, QUANT_TYPES, SHAPES, name_of, weights
from tolerances import accumulation, assert_within

from qlora import ops


def gradients(x, weight, a, b, scaling, bias, lora_x, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, bias, lora_x)]
    x_, a_, b_, bias_, lora_x_ = leaves
    ops.forward(x_, *weight, a_, b_, scaling, bias_, lora_x_).backward(grad)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", ["float32", "that of x"])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(1, 8, 64, 1), (70, 264, 40, 17), (150, 136, 520, 33), (331, 72, 328, 70)]
)
def test_gradients_of_factors_of_any_rank(device, dtype, lora_dtype, m, n, k, r):
    """Several chunks of tokens, features and ranks; the bound allows one rounding to 16 bit, as torch does."""
    s = 0.5
    weight, _ = weights(n, k)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    a, b = torch.randn(r, k), torch.randn(n, r)
    if lora_dtype != "float32":
        a, b = a.to(dtype), b.to(dtype)
    a.requires_grad_(), b.requires_grad_()
    ops.forward(x, *weight, a, b, s).backward(grad)
    for leaf, answer in zip((a, b), oracle.factor_gradients(device, grad, x, a, b, s), strict=True):
        assert_within(leaf.grad, *answer)


@pytest.mark.parametrize("exponent", [-20, 0, 15])
def test_float16_gradients_of_any_size(device, exponent):
    """float16 gradients are tiny, or large with a loss scale; their products with lora_b leave float16's range."""
    m, n, k, r = 40, 64, 128, 16
    weight, _ = weights(n, k)
    x, grad = torch.randn(m, k).half(), (torch.randn(m, n) * 2.0**exponent).clamp(-60000, 60000).half()
    a, b = torch.randn(r, k).requires_grad_(), torch.randn(n, r).requires_grad_()
    ops.forward(x, *weight, a, b, 1.0).backward(grad)
    for leaf, (right, _) in zip((a, b), oracle.factor_gradients(device, grad, x, a, b, 1.0), strict=True):
        assert (leaf.grad.double() - right).norm() <= 2.0**-18 * right.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gradients_with_dropped_input(device, dtype, shape):
    m, n, k = shape
    r, s = 5, 0.7
    weight, dense = weights(n, k)
    x, lora_x, grad = (torch.randn(m, c).to(dtype) for c in (k, k, n))
    a, b, bias = torch.randn(r, k), torch.randn(n, r), torch.randn(n)
    d_x, d_a, d_b, d_bias, d_lora_x = gradients(x, weight, a, b, s, bias, lora_x, grad)
    G, A, B = grad.double(), a.double(), b.double()
    bound = accumulation(n + r + 4, s * (G.abs() @ B.abs() @ A.abs()))
    assert_within(d_lora_x, *oracle.rounded(s * (G @ B @ A), bound, dtype))
    assert_within(d_x, *oracle.dx(device, grad, dense))
    answer_a, answer_b = oracle.factor_gradients(device, grad, lora_x, a, b, s)
    assert_within(d_a, *answer_a)
    assert_within(d_b, *answer_b)
    assert_within(d_bias, *oracle.bias_gradient(grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", [32, 4096])
def test_dx_carries_base_and_adapter_in_one_sum(device, quant_type, dtype, block_size):
    m, n, k, r, s = 21, 70, 90, 4, -1.5
    weight, dense = weights(n, k, quant_type, block_size)
    x = torch.randn(m, k).to(dtype).requires_grad_()
    a, b, grad = torch.randn(r, k), torch.randn(n, r), torch.randn(m, n).to(dtype)
    ops.forward(x, *weight, a, b, s).backward(grad)
    assert_within(x.grad, *oracle.dx(device, grad, dense, a, b, s))


@pytest.mark.parametrize("needed", range(1, 16))
def test_any_subset_of_gradients(needed):
    """Gradients that are not needed are None, and the others do not change."""
    weight, _ = weights(20, 96)
    x, a, b, bias, grad = (
        torch.randn(12, 96),
        torch.randn(3, 96),
        torch.randn(20, 3),
        torch.randn(20),
        torch.randn(12, 20),
    )

    def run(flags):
        leaves = [t.clone().requires_grad_(bool(flags >> i & 1)) for i, t in enumerate((x, a, b, bias))]
        x_, a_, b_, bias_ = leaves
        ops.forward(x_, *weight, a_, b_, 0.5, bias_).backward(grad)
        return [leaf.grad for leaf in leaves]

    everything = run(15)
    for i, gradient in enumerate(run(needed)):
        if needed >> i & 1:
            assert torch.equal(gradient, everything[i])
        else:
            assert gradient is None


def test_gradients_are_bitwise_the_same_for_every_thread_count(device, threads):
    weight, _ = weights(130, 300)
    x, a, b = torch.randn(500, 300), torch.randn(8, 300), torch.randn(130, 8)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(gradients(x, weight, a, b, 0.5, torch.randn(130), x, torch.ones(500, 130)))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(other, results[0], strict=True))


def test_numerical_gradient():
    """Central differences, independent of any formula; float32 steps of 1e-2 suffice for a bilinear function."""
    weight, _ = weights(6, 10)
    x, a, b = torch.randn(3, 10), torch.randn(2, 10), torch.randn(6, 2)
    loss_weights = torch.randn(3, 6)

    def loss(x, a, b):
        return (ops.forward(x, *weight, a, b, 0.5) * loss_weights).sum()

    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    loss(*leaves).backward()
    for position, leaf in enumerate(leaves):
        direction = torch.randn_like(leaf)
        shifted = [
            [t + sign * 1e-2 * direction if i == position else t for i, t in enumerate((x, a, b))] for sign in (1, -1)
        ]
        numeric = (loss(*shifted[0]) - loss(*shifted[1])) / 2e-2
        assert torch.isclose(numeric, (leaf.grad * direction).sum(), rtol=1e-3, atol=1e-3)


def test_double_backward_is_refused():
    weight, _ = weights(6, 10)
    x = torch.randn(3, 10, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.forward(x, *weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_no_gradient_vanishes_silently():
    (packed, absmax, _, _, *rest), _ = weights(8, 64, double_quant=False)
    absmax.requires_grad_()
    with pytest.raises(RuntimeError, match="a 4-bit weight is frozen"):
        ops.dequantize(packed, absmax, None, None, *rest, torch.float32).sum().backward()
    with pytest.raises(RuntimeError, match="require grad: a 4-bit weight is frozen"):
        ops.forward(torch.randn(2, 64), packed, absmax, None, None, *rest)


def test_quantize_is_not_differentiable():
    weight = torch.randn(4, 64, requires_grad=True)
    absmax = ops.quantize(weight, double_quant=False)[1]
    with pytest.raises(RuntimeError, match="not differentiable"):
        absmax.sum().backward()
