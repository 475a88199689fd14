"""Tests that need the simt executor: schedules, memory traffic, profiler ranges of the CUDA kernels."""

import devices
import oracle
import pytest
import torch
from cases import weights
from tolerances import accumulation, assert_within, operand_rounding, output_rounding, split_rounding

from qlora import ops

pytestmark = pytest.mark.skipif(devices.simt_library() is None, reason="libqlora_simt.so was not built")


def run(m, n=136, k=256, dtype=torch.bfloat16, **options):
    """Runs forward and backward with an adapter; returns the results and the counters."""
    torch.manual_seed(0)
    weight, _ = weights(n, k)
    x, a, b = torch.randn(m, k).to(dtype), torch.randn(16, k).to(dtype), torch.randn(n, 16).to(dtype)
    with devices.simt(**options) as library:
        library.qlora_simt_count(1)
        library.qlora_simt_reset()
        try:
            y = ops.forward(x, *weight, a, b, 0.5)
            counts = devices.counters(library)
            gradients = torch.ops.qlora.backward(y, x, *weight, a, b, 0.5, None, True, True, False, True)
        finally:
            library.qlora_simt_count(0)
    return (y, *gradients), counts


@pytest.mark.parametrize("m", [1, 12, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_schedule_gives_the_same_bits(m, dtype):
    first, _ = run(m, dtype=dtype, seed=1)
    for seed in range(2, 6):
        for one, other in zip(first, run(m, dtype=dtype, seed=seed)[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("arch", [75, 86, 90])
def test_every_gpu_gives_a_result(arch):
    """Tiles, and so the order of sums, differ between GPUs; nothing else may differ."""
    for m in (1, 70, 200):
        results = [run(m, dtype=torch.float16, arch=a, sm_count=s)[0] for a, s in ((80, 4), (arch, 108))]
        for one, other in zip(*results, strict=True):
            largest = one.abs().max().item() if one.numel() else 0.0
            assert torch.allclose(one.double(), other.double(), rtol=1e-2, atol=1e-2 * largest)


def test_forward_reads_whole_sectors_without_bank_conflicts():
    for m in (1, 16, 128):
        _, counts = run(m, n=256, k=2048)
        assert counts["shared_load_waves"] == counts["shared_load_ideal"]
        assert counts["shared_store_waves"] == counts["shared_store_ideal"]
        assert counts["global_load_ideal"] >= 0.95 * counts["global_load_sectors"]


def test_weights_are_read_once_by_gemv():
    """4.2 bits per parameter for packed bytes and scale codes, plus x, lora_a and lora_b."""
    n, k = 256, 2048
    _, counts = run(1, n=n, k=k)
    others = (k + 16 * k + n * 16) * 2
    blocks = n // 16
    per_block = (k + 16 * 16 + 16 + 512) * 4  # x, x_down, the tables and the nested scales, for each block of 16 rows
    assert counts["global_load_bytes"] <= n * k * 4.2 / 8 + others + blocks * per_block


def test_low_rank_term_adds_one_step_of_the_product_for_16_ranks():
    n, k, m = 64, 256, 64
    weight, _ = weights(n, k)
    x, a, b = torch.randn(m, k).bfloat16(), torch.randn(16, k).bfloat16(), torch.randn(n, 16).bfloat16()
    with devices.simt() as library:
        library.qlora_simt_reset()
        ops.forward(x, *weight)
        base = devices.counters(library)["mma"]
        library.qlora_simt_reset()
        ops.forward(x, *weight, a, b)
        with_adapter = devices.counters(library)["mma"]
    tiles = (n // 16) * (m // 8)
    down = (m // 8) * (k // 16)  # x lora_aᵀ, 16 ranks
    assert base == tiles * (k // 16)
    assert with_adapter == base + tiles + down


def test_ranges_name_the_operator_and_its_extents():
    weight, _ = weights(40, 128)
    with devices.simt() as library:
        ops.forward(torch.randn(3, 5, 128), *weight, torch.randn(4, 128), torch.randn(40, 4))
        assert library.qlora_simt_last_range() == b"qlora::forward[m=15,n=40,k=128,r=4]"


@pytest.mark.parametrize("r", [0, 8])
def test_17_to_32_tokens_take_two_launches(r):
    weight, _ = weights(72, 192)
    x, bias = torch.randn(29, 192).bfloat16(), torch.randn(72)
    lora = (torch.randn(r, 192), torch.randn(72, r)) if r else (None, None)
    with devices.simt() as library:
        library.qlora_simt_reset()
        y = ops.forward(x, *weight, *lora, 0.5, bias)
        assert devices.counters(library)["launches"] == (3 if r else 2)  # one for the dot products with lora_a
        halves = [ops.forward(part, *weight, *lora, 0.5, bias) for part in x.split(16)]
        assert torch.equal(y, torch.cat(halves))
        adapters = tuple(torch.stack([t, 2 * t]) for t in lora) if r else ()
        if adapters:  # keeps each row's adapter
            scaling, of_row = torch.ones(2), torch.arange(29) % 3 - 1
            y = ops.forward_multi(x, *weight, *adapters, scaling, of_row)
            halves = [
                ops.forward_multi(part, *weight, *adapters, scaling, rows)
                for part, rows in zip(x.split(16), of_row.split(16), strict=True)
            ]
            assert torch.equal(y, torch.cat(halves))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_launches_of_an_adapted_layer(dtype):
    """Forward: down projection, product. Backward: both down projections, both gradients, dx; from 128 tokens on also
    the sums over chunks of tokens."""
    weight, _ = weights(136, 192)
    x, grad = (torch.randn(64, c).to(getattr(torch, dtype)) for c in (192, 136))
    a, b = torch.randn(8, 192), torch.randn(136, 8)
    with devices.simt() as library:
        library.qlora_simt_reset()
        ops.forward(x, *weight, a, b, 0.5)
        assert devices.counters(library)["launches"] == 2
        library.qlora_simt_reset()
        torch.ops.qlora.backward(grad, x, *weight, a, b, 0.5, None, True, True, False, False)
        assert devices.counters(library)["launches"] == 3
        library.qlora_simt_reset()
        twice = [torch.cat([t] * 2) for t in (grad, x)]
        torch.ops.qlora.backward(*twice, *weight, a, b, 0.5, None, True, True, False, False)
        assert devices.counters(library)["launches"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("panel_bytes", [200_000, 128 << 20], ids=["panels", "whole"])
def test_many_tokens_by_dequantize_matmul(dtype, adapter, panel_bytes):
    """On sm_90 W is dequantized, and torch's matmul adds to the adapter's term, which was rounded before."""
    m, n, k, r, s = 1030, 520, 576, 5, 0.5
    weight, dense = weights(n, k)
    x, grad, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n)
    a, b = torch.randn(r, k), torch.randn(n, r)
    lora = (a, b, s) if adapter else (None, None, 1.0)
    with devices.simt(arch=90, panel_bytes=panel_bytes) as library:
        library.qlora_simt_reset()
        y = ops.forward(x, *weight, *lora, bias)
        launches = devices.counters(library)["launches"]
        assert library.qlora_simt_last_range().startswith(b"qlora::forward")
        library.qlora_simt_reset()
        d_x = torch.ops.qlora.backward(grad, x, *weight, *lora, None, True, False, False, False)[0]
        # Only the low-rank products are qlora's: down has 33 tiles of 32 tokens and 17 chunks of 32, with a split
        # factor; up has 17 tiles of 64 tokens and 5 of 8 x 16 rows, with three products of parts.
        products = 33 * 4 * 17 * 2 * 2 + 17 * 8 * 5 * 8 * 3
        assert devices.counters(library)["mma"] == (products if adapter else 0)
    # Launches for the panels of 128 rows, and for the down and up projections.
    assert launches == (1 if panel_bytes == 128 << 20 else 5) + (2 if adapter else 0)
    X, G, A, B = x.double(), grad.double(), a.double(), b.double()
    for actual, tokens, W, down, up, addend in (
        (y, X, dense.T, A.T, B.T, bias.double()),
        (d_x, G, dense, B, A, 0 * A[0]),
    ):
        base, products = tokens @ W + addend, tokens.abs() @ W.abs() + addend.abs()
        bound = accumulation(len(W), products) + operand_rounding("simt", dtype, products)
        expected = base
        if adapter:
            t = s * tokens.abs() @ down.abs()
            products, small = t @ up.abs(), t.sum(1, keepdim=True) + up.abs().sum(0)
            bound = bound + accumulation(len(W) + r, products) + 2 * split_rounding("simt", dtype, products, small)
            expected = base + s * tokens @ down @ up
            term = (expected - base).abs() + addend.abs()  # rounded together with the bias
            bound = bound + output_rounding(term + bound, dtype)
        assert_within(actual, *oracle.rounded(expected, bound, dtype))


@pytest.mark.parametrize("runs", [False, True])
def test_a_row_is_computed_as_if_its_adapter_were_the_only_one(runs):
    """Bitwise the same in a tile of tokens with other adapters, one of which contains nan and inf."""
    m, n, k, r = 150, 72, 256, 24
    weight, _ = weights(n, k)
    x, a, b = (torch.randn(s).bfloat16() for s in ((m, k), (3, r, k), (3, n, r)))
    a[1, 3, 5], b[1, 2, 1] = float("nan"), float("inf")
    of_row = torch.arange(m) * 4 // m - 1 if runs else torch.arange(m) % 4 - 1
    scaling = torch.tensor([0.5, 1.0, 3.0])
    with devices.simt():
        y = ops.forward_multi(x, *weight, a, b, scaling, of_row)
        for i in (0, 2):
            alone = ops.forward(x, *weight, a[i], b[i], scaling[i].item())
            assert torch.equal(y[of_row == i], alone[of_row == i])
        assert torch.equal(y[of_row == -1], ops.forward(x, *weight)[of_row == -1])
    assert not y[of_row == 1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [3, 40])
def test_a_row_with_an_adapter_that_is_not_there_is_nan(m, dtype):
    """It is nan because checking adapter_of_row on the host would wait for the GPU. No other row is affected."""
    weight, _ = weights(24, 64)
    x, a, b = torch.randn(m, 64).to(dtype), torch.randn(2, 4, 64), torch.randn(2, 24, 4)
    of_row = torch.arange(m) % 3 - 1
    with devices.simt():
        right = ops.forward_multi(x, *weight, a, b, torch.ones(2), of_row)
        of_row[1] = 7
        y = ops.forward_multi(x, *weight, a, b, torch.ones(2), of_row)
    assert y[1].isnan().all()
    others = torch.arange(m) != 1
    assert torch.equal(y[others], right[others])


@pytest.mark.parametrize(("arch", "m", "n", "k"), [(75, 8, 16, 13824), (75, 1, 160, 64 * 401), (86, 8, 160, 64 * 301)])
def test_gemv_with_several_panels_of_scales(arch, m, n, k):
    """With little shared memory or long rows, scales are dequantized in panels; no warp may miss a panel's end."""
    weight, dense = weights(n, k)
    x = torch.randn(m, k).half()
    with devices.simt(arch=arch):
        y = ops.forward(x, *weight)
    expected, bound = oracle.forward("simt", x, dense)
    assert_within(y, expected, bound)
    # The bound is wide for such long rows. A missed chunk is a hundredth of it, but changes the norm.
    assert (y.double() - expected).norm() < 2e-3 * expected.norm()


def experts_layer(tokens, choices, experts, n=72, k=128, dtype=torch.bfloat16):
    parts = [weights(n, k)[0] for _ in range(experts)]
    stacked = [torch.stack([part[i] for part in parts]) for i in range(4)]
    lora = torch.randn(experts, 8, k), torch.randn(experts, n, 8), 0.5
    return torch.randn(tokens, k).to(dtype), (*stacked, [experts, n, k], *parts[0][5:]), lora, torch.randn(experts, n)


# The expert of row i of 96, of `experts`.
ROUTES = {
    "one gets all": lambda i, experts: 0 * i + experts - 1,
    "all get some": lambda i, experts: i % experts,
    "one gets a whole tile": lambda i, experts: torch.where(i < 64, 7, 8),
    "on other processes": lambda i, experts: torch.where(i % 3 == 0, 5, i - 48),
    "none is here": lambda i, experts: -i - 1,
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("experts", [11, 40], ids=["gemm", "gemv"])
def test_a_row_of_an_expert_does_not_depend_on_where_it_stands(experts, route, dtype):
    """Bitwise the same as with one expert for all rows, in a stack of as many copies of its weight."""
    x, weight, (a, b, s), bias = experts_layer(48, 2, experts, dtype=dtype)
    of_row = route(torch.arange(96), experts)
    known = (of_row >= 0) & (of_row < experts)
    with devices.simt():
        y = ops.forward_experts(x, *weight, of_row, a, b, s, bias)
        for i in of_row[known].unique():
            *packed, a_, b_, bias_ = (t[i : i + 1].expand(t.shape).contiguous() for t in (*weight[:4], a, b, bias))
            alone = ops.forward_experts(x, *packed, *weight[4:], 0 * of_row, a_, b_, s, bias_)
            assert torch.equal(y[of_row == i], alone[of_row == i])
    assert not y[~known].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_launches_of_experts_do_not_depend_on_their_number(dtype):
    """Forward: two of the plan, the down projection, the product. Backward: two of the plan, both down projections,
    both gradients, dx and d_bias; in float32 both down projections and both gradients are launches of their own.
    torch's sum over choices is not counted."""
    counts = set()
    for experts in (1, 3, 40):
        x, weight, lora, bias = experts_layer(48, 2, experts, dtype=dtype)
        of_row = torch.arange(96) % experts
        with devices.simt() as library:
            library.qlora_simt_reset()
            y = ops.forward_experts(x, *weight, of_row, *lora, bias)
            forward = devices.counters(library)["launches"]
            library.qlora_simt_reset()
            torch.ops.qlora.backward.experts(y, x, *weight, of_row, *lora, True, True, True)
            counts.add((forward, devices.counters(library)["launches"]))
    assert counts == {(4, 8 if dtype == torch.float32 else 6)}


@pytest.mark.parametrize(("rows", "few"), [(48, 24), (330, 2)], ids=["gemv", "gemm"])
def test_empty_experts_read_no_weight(rows, few):
    """Of 40 experts two have rows; the others cost some numbers of the plan, less than the weight of one."""
    read = []
    for experts in (few, 40):
        torch.manual_seed(0)
        x, weight, _, _ = experts_layer(rows, 1, experts, n=256, k=1024)
        with devices.simt(sm_count=1000) as library:  # so many SMs take the same tile for any number of experts
            library.qlora_simt_count(1)
            library.qlora_simt_reset()
            try:
                ops.forward_experts(x, *weight, torch.arange(rows) % 2)
                read.append(devices.counters(library)["global_load_bytes"])
            finally:
                library.qlora_simt_count(0)
    numbers = 2 * 8 * rows * (41 - few)  # both launches of the plan read expert_of_row once for each expert
    assert read[1] - read[0] < numbers + 256 * 1024 // 2


@pytest.mark.parametrize("seed", range(1, 5))
def test_every_schedule_of_experts_gives_the_same_bits(seed):
    x, weight, lora, bias = experts_layer(48, 2, 5)
    of_row = torch.randint(-1, 6, (96,))
    results = []
    for number in (1, seed):
        with devices.simt(seed=number):
            y = ops.forward_experts(x, *weight, of_row, *lora, bias)
            results.append((y, *torch.ops.qlora.backward.experts(y, x, *weight, of_row, *lora, True, True, True)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
