"""Products large enough for several blocks of tokens, panels of W and chunks of the reduction, on each CPU level."""

import oracle
import pytest
import torch
from cases import weights
from tolerances import assert_within

from qlora import _C, ops

LEVELS = [f"cpu-{isa}" for isa in _C.runnable_isas()]
# Rows of whole words; rows with half a chunk left over; blocks that cross rows; rows that start inside a byte.
WEIGHTS = ((136, 1152, 64), (300, 1088, 64), (140, 576, 128), (71, 333, 64), (130, 640, 32))


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("QLORA_CPU_ISA", request.param[4:])
    return request.param


@pytest.mark.parametrize(("n", "k", "block"), WEIGHTS)
def test_forward_and_backward(level, n, k, block):
    m, r, s = 550, 20, 0.5
    weight, dense = weights(n, k, block_size=block)
    x, grad = torch.randn(m, k).bfloat16().requires_grad_(), torch.randn(m, n).bfloat16()
    a, b = torch.randn(r, k).requires_grad_(), torch.randn(n, r).requires_grad_()
    y = ops.forward(x, *weight, a, b, s)
    y.backward(grad)
    assert_within(y, *oracle.forward(level, x, dense, a, b, s))
    assert_within(x.grad, *oracle.dx(level, grad, dense, a, b, s))
    for leaf, answer in zip((a, b), oracle.factor_gradients(level, grad, x, a, b, s), strict=True):
        assert_within(leaf.grad, *answer)


@pytest.mark.parametrize("m", [3, 16, 17, 32, 33])
@pytest.mark.parametrize(("n", "k", "block"), WEIGHTS)
def test_forward_of_few_tokens(level, m, n, k, block):
    """Up to 32 tokens sums stay in registers for the whole reduction; both widths, with partial panels and chunks."""
    r, s = 20, 0.5
    weight, dense = weights(n, k, block_size=block)
    x, bias = torch.randn(m, k).bfloat16(), torch.randn(n)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(r, k).to(dtype), torch.randn(n, r).to(dtype)
        y = ops.forward(x, *weight, a, b, s, bias)
        assert_within(y, *oracle.forward(level, x, dense, a, b, s, bias))


def test_backward_is_bitwise_the_same_for_every_thread_count(level, threads):
    weight, _ = weights(300, 1088)
    x, grad = torch.randn(550, 1088).bfloat16(), torch.randn(550, 300).bfloat16()
    a, b = torch.randn(20, 1088), torch.randn(300, 20)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(torch.ops.qlora.backward(grad, x, *weight, a, b, 0.5, None, True, True, False, True))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_nan_of_one_token_stays_its_own(level):
    """Other tokens stay finite, also in the same tile, in forward and backward."""
    weight, _ = weights(64, 128)
    x, grad = torch.randn(40, 128).bfloat16(), torch.randn(40, 64).bfloat16()
    x[5, 3], grad[7, 2] = float("nan"), float("inf")
    a, b = torch.randn(4, 128), torch.randn(64, 4)
    y = ops.forward(x, *weight, a, b)
    d_x = torch.ops.qlora.backward(grad, x, *weight, a, b, 1.0, None, True, False, False, False)[0]
    assert y[5].isnan().all()
    assert not d_x[7].isfinite().any()
    assert y[torch.arange(40) != 5].isfinite().all()
    assert d_x[torch.arange(40) != 7].isfinite().all()
