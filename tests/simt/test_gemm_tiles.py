"""Tests every tile of gemm and gemm_dx, with experts too, and dequantize_matmul, on described GPUs for which select.h
chooses them.

The PTX tests run them too.
"""

import devices
import oracle
import pytest
import torch
from cases import weights
from tolerances import assert_within

from qlora import _C, ops

LARGE, SMALL, HOPPER = (80, 163 * 1024), (89, 99 * 1024), (90, 227 * 1024)  # arch, shared memory
# Tokens; rows and tokens of the tile; the GPU; its number of SMs, for which select.h chooses the tile for (840, 832).
TILES = {
    "64x32": (40, (64, 32), LARGE, 32),
    "64x64": (40, (64, 64), LARGE, 14),
    "128x64": (40, (128, 64), LARGE, 7),
    "small": (40, (64, 32), SMALL, 32),
    "wgmma-64": (40, (128, 64), HOPPER, 7),
    "wgmma-128": (100, (128, 128), HOPPER, 7),
}
# 13, 14 or 67 chunks: not divisible by the number of groups or stages, and 67 exceed a panel of scales.
CASES = [(tile, 840, 832, adapters) for tile in TILES for adapters in (0, 1, 3)] + [
    (tile, 72, 4288, 0) for tile in TILES
]


@pytest.fixture
def device():
    if devices.simt_library() is None:
        pytest.skip("libqlora_simt.so was not built")
    with devices.simt():
        yield "simt"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("tile", "n", "k", "adapters"),
    [
        pytest.param(*case, marks=pytest.mark.archs(*(["sm_90"] if "wgmma" in case[0] else ["sm_80", "sm_90"])))
        for case in CASES
    ],
)
def test_every_tile(device, tile, n, k, adapters, dtype):
    m, rows_and_tokens, (arch, shared_bytes), sm_count = TILES[tile]
    r = 5

    devices.simt_library().qlora_simt_gpu(arch, sm_count, shared_bytes, _C.GPU_PANEL_BYTES)
    if n == 840:
        chosen = _C.cuda_select(m, n, k, str(dtype)[6:], 64, arch, sm_count, shared_bytes)
        assert (chosen["forward"], chosen["backward"]) == ("gemm", "gemm_dx")
        assert chosen["forward_tile"] == chosen["backward_tile"] == rows_and_tokens
    weight, dense = weights(n, k)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    of_row = torch.arange(m) % max(1, adapters)
    a, b, s = torch.randn(max(1, adapters), r, k), torch.randn(max(1, adapters), n, r), torch.rand(max(1, adapters))
    one = (None, None, 1.0) if adapters == 0 else (a[0], b[0], s[0].item())
    y = ops.forward_multi(x, *weight, a, b, s, of_row) if adapters > 1 else ops.forward(x, *weight, *one)
    if adapters > 1:
        dx = torch.ops.qlora.backward.multi(grad, x, *weight, a, b, s, of_row, True, False, False)[0]
    else:
        dx = torch.ops.qlora.backward(grad, x, *weight, *one, None, True, False, False, False)[0]
    lora = a, b, s * (adapters > 0), of_row
    assert_within(y, *oracle.forward_multi(device, x, dense, *lora))
    assert_within(dx, *oracle.dx_multi(device, grad, dense, *lora))


# Tile, GPU, and a number of SMs for which select.h chooses the tile for 160 rows of three experts and (840, 832).
TILES_OF_EXPERTS = {
    "64x32": ((64, 32), LARGE, 84),
    "64x64": ((64, 64), LARGE, 56),
    "128x64": ((128, 64), LARGE, 28),
    "small": ((64, 32), SMALL, 84),
}


@pytest.mark.archs("sm_80", "sm_90")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("tile", "n", "k", "r"),
    [(tile, 840, 832, r) for tile in TILES_OF_EXPERTS for r in (None, 5)] + [("64x32", 72, 4288, 3)],
)
def test_every_tile_of_experts(device, tile, n, k, r, dtype):
    """70 rows have one expert, more than a tile; 21 have none; k = 4288 has more chunks than a panel of scales."""
    rows_and_tokens, (arch, shared_bytes), sm_count = TILES_OF_EXPERTS[tile]
    devices.simt_library().qlora_simt_gpu(arch, sm_count, shared_bytes, _C.GPU_PANEL_BYTES)
    if n == 840:
        chosen = _C.cuda_select(160, n, k, str(dtype)[6:], 64, arch, sm_count, shared_bytes, experts=3)
        assert chosen["experts_tile"] == chosen["experts_backward_tile"] == rows_and_tokens
    of_row = torch.cat([torch.full((70,), 2), torch.full((21,), -1), torch.arange(69) % 2])[torch.randperm(160)]
    made = [weights(n, k) for _ in range(3)]
    stacked = [torch.stack([weight[i] for weight, _ in made]) for i in range(4)]
    weight, dense = (*stacked, [3, n, k], *made[0][0][5:]), torch.stack([dense for _, dense in made])
    x, grad = torch.randn(80, k).to(dtype), torch.randn(160, n).to(dtype)
    lora = (None, None, 1.0) if r is None else (torch.randn(3, r, k), torch.randn(3, n, r), 0.5)
    bias = torch.randn(3, n)
    y = ops.forward_experts(x, *weight, of_row, *lora, bias)
    d_x = torch.ops.qlora.backward.experts(grad, x, *weight, of_row, *lora, True, False, False)[0]
    assert_within(y, *oracle.forward_experts(device, x, dense, of_row, *lora, bias))
    assert_within(d_x, *oracle.dx_experts(device, grad, dense, of_row, len(x), *lora))


@pytest.mark.archs("sm_80", "sm_90")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_adapters_by_dequantize_matmul(device, dtype):
    """Each row equals the result with only its adapter, in forward and dx: torch's GEMM adds to each row's own term."""
    m, n, k, r = 70, 520, 576, 24
    weight, _ = weights(n, k)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    a, b, scaling, of_row = torch.randn(3, r, k), torch.randn(3, n, r), torch.rand(3), torch.arange(m) % 4 - 1
    of_row[1] = 7  # invalid adapter
    backward = torch.ops.qlora.backward
    library = devices.simt_library()
    library.qlora_simt_gpu(LARGE[0], 4, LARGE[1], _C.GPU_PANEL_BYTES)
    library.qlora_simt_reset()
    y = ops.forward_multi(x, *weight, a, b, scaling, of_row)
    assert devices.counters(library)["launches"] == 5  # two for the plan, down, up, dequantize
    dx = backward.multi(grad, x, *weight, a, b, scaling, of_row, True, False, False)[0]
    assert y[1].isnan().all()
    assert dx[1].isnan().all()
    for i in range(-1, 3):
        lora = (a[i], b[i], scaling[i].item()) if i >= 0 else (None, None, 1.0)
        mine = of_row == i
        assert torch.equal(y[mine], ops.forward(x, *weight, *lora)[mine])
        alone = backward(grad, x, *weight, *lora, None, True, False, False, False)[0]
        assert torch.equal(dx[mine], alone[mine])
