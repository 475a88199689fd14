"""search_scales and quantize_with_feedback: bit-exact with the reference on every device, and less error by design."""

import pytest
import torch
from cases import BLOCK_SIZES, QUANT_TYPES

from qlora import ops, reference

SHAPES = ((1, 1), (1, 64), (3, 37), (64, 64), (65, 100), (130, 192), (7, 300), (67, 33), (200, 6), (2, 129))


def problem(n, k):
    """A weight, a lower triangular feedback and an order."""
    return torch.randn(n, k), torch.randn(k, k) / k**0.5, torch.randperm(k)


def correlated_inputs(tokens, k, rank=None):
    """Inputs of a layer as language models have them: a few strong directions, channels of very different size."""
    mixing = torch.randn(rank or k // 4, k) * torch.logspace(0, -1, k)
    return torch.randn(tokens, len(mixing)) @ mixing + 0.1 * torch.randn(tokens, k)


def feedback_of(x, order, damping=0.1):
    """The factors that minimize the error of ``x @ weight.T``: the unit triangle of the Hessian's reversed Cholesky."""
    hessian = (x.double().T @ x.double())[order][:, order]
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return (upper / upper.diagonal()).T.float().contiguous()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_search_scales_equals_reference(device, shape, quant_type, double_quant):
    weight, importance = torch.randn(shape), torch.rand(shape[1])
    actual = ops.search_scales(weight, importance, quant_type, 64, double_quant)
    for a, b in zip(actual, reference.search_scales(weight, importance, quant_type, 64, double_quant), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_search_scales_every_block_size(device, block_size):
    weight, importance = torch.randn(5, 1001), torch.rand(1001)
    expected = reference.search_scales(weight, importance, "nf4", block_size)
    for a, b in zip(ops.search_scales(weight, importance, "nf4", block_size), expected, strict=True):
        assert torch.equal(a, b)


def test_search_scales_of_odd_blocks(device):
    weight = torch.randn(6, 64)
    weight[0] = 0  # no scale
    weight[1] *= 1e-40  # subnormal
    weight[2] = 3e38  # the largest factors overflow
    weight[3] = torch.where(torch.arange(64) == 7, 5.0, 0.0)  # one value: factor 1 is exact
    absmax, _, _ = ops.search_scales(weight, torch.ones(64), "nf4", 64, False)
    assert torch.equal(absmax, reference.search_scales(weight, torch.ones(64), "nf4", 64, False)[0])
    assert absmax[0] == 0
    assert absmax[1] == weight[1].abs().max()
    assert absmax[2].isfinite()
    assert absmax[3] == 5
    unimportant, _, _ = ops.search_scales(weight, torch.zeros(64), "nf4", 64, False)
    assert torch.equal(unimportant, weight.abs().amax(1))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_equals_reference(device, shape, quant_type, double_quant):
    weight, feedback, order = problem(*shape)
    _, *scales = ops.quantize(weight, quant_type, 64, double_quant)
    for options in ((), (feedback,), (feedback, order), (None, order)):
        actual = ops.quantize_with_feedback(weight, *scales, quant_type, 64, *options)
        assert torch.equal(actual, reference.quantize_with_feedback(weight, *scales, quant_type, 64, *options))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_feedback_every_block_size(device, block_size):
    weight, feedback, order = problem(9, 517)
    _, *scales = ops.quantize(weight, "nf4", block_size)
    arguments = (weight, *scales, "nf4", block_size, feedback, order)
    assert torch.equal(ops.quantize_with_feedback(*arguments), reference.quantize_with_feedback(*arguments))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_feedback_it_is_nearest_rounding(device, shape, quant_type):
    weight = torch.randn(shape)
    weight[0] *= 1e-40  # subnormal scales
    packed, *scales = ops.quantize(weight, quant_type, 64, False)
    assert torch.equal(ops.quantize_with_feedback(weight, *scales, quant_type, 64), packed)
    zero = torch.zeros(shape[1], shape[1])
    assert torch.equal(ops.quantize_with_feedback(weight, *scales, quant_type, 64, zero), packed)
    identity = feedback_of(torch.eye(shape[1]), torch.randperm(shape[1]))  # the Hessian of uncorrelated inputs
    assert torch.equal(ops.quantize_with_feedback(weight, *scales, quant_type, 64, identity), packed)


def test_only_the_lower_triangle_is_read(device):
    weight, feedback, _ = problem(70, 90)
    _, *scales = ops.quantize(weight)
    expected = ops.quantize_with_feedback(weight, *scales, "nf4", 64, feedback)
    feedback += torch.triu(torch.full_like(feedback, 1e30))
    assert torch.equal(ops.quantize_with_feedback(weight, *scales, "nf4", 64, feedback), expected)


def test_the_error_of_unseen_outputs_falls(device):
    """On held-out inputs the searched scales lose less than plain ones, and feedback at most 0.6 times as much."""
    n, k = 64, 128
    x, unseen = correlated_inputs(2048 + 512, k).split((2048, 512))
    weight = torch.randn(n, k) / k**0.5

    def error(*quantized):
        dense = ops.dequantize(*quantized, (n, k), "nf4", 64, torch.float32)
        return (unseen.double() @ (weight - dense).double().T).square().sum()

    plain = error(*ops.quantize(weight))
    importance = x.square().mean(0)
    scales = ops.search_scales(weight, importance)
    assert error(ops.quantize_with_feedback(weight, *scales, "nf4", 64), *scales) < plain
    order = importance.argsort(descending=True)
    feedback = feedback_of(x, order)
    packed = ops.quantize_with_feedback(weight, *scales, "nf4", 64, feedback, order)
    assert error(packed, *scales) <= 0.6 * plain


def test_threads_do_not_change_the_result(device):
    weight, feedback, order = problem(300, 70)
    scales = ops.search_scales(weight, torch.rand(70).sort().values)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.quantize_with_feedback(weight, *scales, "nf4", 64, feedback, order))
    assert torch.equal(*results)


def test_empty_weights(device):
    for shape in ((0, 64), (64, 0)):
        weight = torch.empty(shape)
        scales = ops.search_scales(weight, torch.ones(shape[1]))
        assert ops.quantize_with_feedback(weight, *scales, "nf4", 64).shape == (0,)


def with_value(t, row, column, value):
    changed = t.clone()
    changed[row, column] = value
    return changed


def test_bad_arguments_are_refused(device):
    weight, feedback, order = problem(4, 64)
    scales = ops.search_scales(weight, torch.ones(64))

    def run(weight=weight, scales=scales, **options):
        ops.quantize_with_feedback(weight, *scales, "nf4", 64, **options)

    def column(value):
        return with_value(torch.ones(1, 64), 0, 7, value)[0]

    cases = {
        "weight.float()": lambda: run(weight.bfloat16()),
        "must be a matrix": lambda: run(weight[0]),
        r"feedback has shape \[63, 63\]": lambda: run(feedback=torch.zeros(63, 63)),
        "feedback must be float32|feedback has the wrong dtype": lambda: run(feedback=feedback.double()),
        r"order\[63\]=0 must name": lambda: run(order=torch.cat((torch.arange(63), torch.zeros(1, dtype=torch.int64)))),
        r"order\[0\]=64 must name": lambda: run(order=torch.arange(64, 0, -1)),
        "order has the wrong dtype": lambda: run(order=order.int()),
        r"absmax has 2 values": lambda: run(scales=(scales[0][:2], *scales[1:])),
        r"weight\[2, 3\] is nan or inf": lambda: run(with_value(weight, 2, 3, torch.nan)),
        r"feedback\[5, 1\] is nan or inf": lambda: run(feedback=with_value(feedback, 5, 1, torch.inf)),
        r"importance has shape \[63\]": lambda: ops.search_scales(weight, torch.ones(63)),
        "importance has the wrong dtype": lambda: ops.search_scales(weight, torch.ones(64).double()),
        r"importance\[7\]=nan: .* finite and at least 0": lambda: ops.search_scales(weight, column(torch.nan)),
        r"importance\[7\]=inf": lambda: ops.search_scales(weight, column(torch.inf)),
        r"importance\[7\]=-1": lambda: ops.search_scales(weight, column(-1.0)),
        "block_size=48": lambda: ops.search_scales(weight, torch.ones(64), "nf4", 48),
        "quant_type": lambda: ops.search_scales(weight, torch.ones(64), "nf5"),
    }
    for message, call in cases.items():
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"weight\[1, 9\] is nan or inf"):
        ops.search_scales(with_value(weight, 1, 9, torch.inf), torch.ones(64))


def test_fake_kernels_agree(device):
    weight, feedback, order = problem(7, 75)
    for double_quant in (False, True):
        scales = ops.search_scales(weight, torch.ones(75), "nf4", 64, double_quant)
        arguments = (weight, torch.ones(75), "nf4", 64, double_quant)
        torch.library.opcheck(torch.ops.qlora.search_scales, arguments, test_utils="test_faketensor")
        torch.library.opcheck(
            torch.ops.qlora.quantize_with_feedback,
            (weight, *scales, "nf4", 64, feedback, order),
            test_utils="test_faketensor",
        )
