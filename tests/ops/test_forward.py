"""The fused forward against float64, on every ISA, dtype, quant type and shape, with derived tolerances."""

import oracle
import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, QUANT_TYPES, SHAPES, name_of, weights
from tolerances import assert_error_at_most, assert_within, multiplies_16_bit

from qlora import ops, reference


def check(device, x, weight, dense, *options):
    y = ops.forward(x, *weight, *options)
    assert y.dtype == x.dtype
    answer = oracle.forward(device, x, dense, *options)
    assert_within(y, *answer)
    return y, answer.expected


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_base(device, quant_type, dtype, shape):
    m, n, k = shape
    weight, dense = weights(n, k, quant_type)
    check(device, torch.randn(m, k).to(dtype), weight, dense)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_bias_and_dropped_input(device, dtype, shape):
    m, n, k = shape
    weight, dense = weights(n, k)
    x = torch.randn(m, k).to(dtype)
    lora_x = (x * (torch.rand(m, k) > 0.3)).to(dtype)
    for adapter_dtype in dict.fromkeys((dtype, torch.float32)):
        a, b = torch.randn(5, k).to(adapter_dtype), torch.randn(n, 5).to(adapter_dtype)
        check(device, x, weight, dense, a, b, -0.7, torch.randn(n).to(adapter_dtype), lora_x)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("m", [2, 20])
def test_every_block_size(device, m, double_quant, block_size):
    """With k = 1056 = 33 * 32, rows start inside the larger blocks."""
    weight, dense = weights(9, 1056, "nf4", block_size, double_quant)
    check(device, torch.randn(m, 1056), weight, dense)


@pytest.mark.parametrize("rank", [1, 16, 64, 200])
@pytest.mark.parametrize("m", [1, 40])
def test_ranks(device, m, rank):
    weight, dense = weights(33, 160)
    check(device, torch.randn(m, 160), weight, dense, torch.randn(rank, 160), torch.randn(33, rank), 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 64])
def test_error_against_dequantize_then_matmul(device, m, dtype):
    """The error is bounded by torch's own error.

    In 16 bit at most torch's, because torch rounds W and most kernels do not. CPU tiles round W as torch does, so their
    error equals torch's except for the order of summation, which changes it by 2^-24 sqrt(k) / 2^-9, about 1e-3. In
    float32, where only the order of summation differs, at most twice torch's. One token on a GPU is compared only with
    float64, because torch uses another kernel for it.
    """
    k = 1024
    weight, dense = weights(256, k)
    x = torch.randn(m, k).to(dtype)
    y, expected = check(device, x, weight, dense)
    if device == "cuda" and dtype == torch.float32 and m == 1:
        return
    rounds_w = device.startswith("cpu") and multiplies_16_bit(device, dtype)
    factor = 2 if dtype == torch.float32 else 1 + 2.0**-15 * k**0.5 if rounds_w else 1
    assert_error_at_most(factor, y, reference.forward(x, *weight), expected)


def test_long_rows(device):
    """Rows longer than one chunk (512), and with more scales than one nested block (256)."""
    for k in (8192 + 96, 9001):
        weight, dense = weights(3, k)
        check(device, torch.randn(2, k), weight, dense)


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_across_nested_blocks(device, dtype, block_size):
    """256 blocks share a nested scale. A row may begin in one nested block and end in another, in a chunk's middle."""
    for n, k in ((64, 576), (19, 1024 + 128), (3, 8192 + 64)):
        weight, dense = weights(n, k, block_size=block_size)
        for m in (1, 3):
            check(device, torch.randn(m, k).to(dtype), weight, dense)


def test_leading_dimensions_and_strides(device):
    weight, dense = weights(24, 64)
    x = torch.randn(64, 3, 5).permute(1, 2, 0)  # not contiguous
    y, _ = check(device, x, weight, dense)
    assert y.shape == (3, 5, 24)


def test_one_dimensional_x(device):
    weight, dense = weights(24, 64)
    y, _ = check(device, torch.randn(64), weight, dense)
    assert y.shape == (24,)


def test_packed_as_matrix_equals_flat():
    weight, _ = weights(24, 64)
    x = torch.randn(3, 64)
    matrix = (weight[0].view(24, 32), *weight[1:])
    assert torch.equal(ops.forward(x, *weight), ops.forward(x, *matrix))


def test_none_and_empty_nested_tensors_mean_the_same():
    (packed, absmax, _, _, *rest), _ = weights(24, 64, double_quant=False)
    x = torch.randn(3, 64)
    assert torch.equal(
        ops.forward(x, packed, absmax, None, None, *rest),
        ops.forward(x, packed, absmax, torch.empty(0), torch.empty(0), *rest),
    )


@pytest.mark.parametrize("m", [1, 8, 9, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_for_every_thread_count_and_run(device, dtype, m, threads):
    weight, _ = weights(300, 576)
    x, a, b = torch.randn(m, 576).to(dtype), torch.randn(16, 576), torch.randn(300, 16)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        results.append(ops.forward(x, *weight, a, b, 0.5))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_input_features(device, dtype):
    weight, _ = weights(5, 0)
    bias = torch.randn(5).to(dtype)
    for m in (2, 12, 30):
        x = torch.empty(m, 0, dtype=dtype, requires_grad=True)
        y = ops.forward(x, *weight, bias=bias)
        assert torch.equal(y, bias.expand(m, 5))
        y.sum().backward()
        assert x.grad.shape == (m, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_output_features(device, dtype):
    weight, _ = weights(0, 64)
    for m in (2, 30):
        x = torch.randn(m, 64).to(dtype).requires_grad_()
        ops.forward(x, *weight).sum().backward()
        assert torch.equal(x.grad, torch.zeros(m, 64, dtype=dtype))


@pytest.mark.parametrize("m", [2, 30])
def test_tensors_need_not_be_aligned(device, m):
    """Views into the middle of a storage, because the kernels load 16 bytes at a time."""

    def shifted(t):
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    weight, _ = weights(40, 128)
    x, a, b = torch.randn(m, 128).bfloat16(), torch.randn(16, 128).bfloat16(), torch.randn(40, 16).bfloat16()
    views = [shifted(t) if isinstance(t, torch.Tensor) else t for t in (x, *weight, a, b)]
    assert torch.equal(ops.forward(*views), ops.forward(x, *weight, a, b))


def test_no_dense_copy_of_the_weight_is_ever_allocated():
    """Only panels are allocated: no allocation is near n * k 16-bit elements, in forward or backward."""
    n = k = 2048
    weight, _ = weights(n, k)
    x = torch.randn(16, k, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(8, k, requires_grad=True), torch.randn(n, 8, requires_grad=True)
    ops.forward(x, *weight, a, b).sum().backward()  # warm up: creates the threads' workspaces
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.forward(x, *weight, a, b).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < n * k // 4
