"""Every tile of gemm and gemm_dx, on a GPU described so that select.h chooses it; run as PTX too."""

import devices
import pytest
import torch
from cases import weights
from tolerances import accumulation, assert_within, operand_rounding, output_rounding

from qlora import _C, ops

# (rows, tokens) of a tile, and the GPU: its SMs decide, and its shared memory.
LARGE, SMALL = 227 * 1024, 99 * 1024
TILES = [((64, 32), 8, LARGE), ((64, 64), 4, LARGE), ((128, 64), 2, LARGE), ((64, 32), 8, SMALL)]


@pytest.fixture
def device():
    if devices.simt_library() is None:
        pytest.skip("libqlora_simt.so was not built")
    with devices.simt():
        yield "simt"


@pytest.mark.archs("sm_80", "sm_90")
@pytest.mark.parametrize("adapters", [0, 1, 3], ids=["base", "adapter", "adapters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("tile", "sm_count", "shared_bytes"), TILES, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else v
)
def test_every_tile(device, tile, sm_count, shared_bytes, dtype, adapters):
    m, n, k, r = 40, 136, 192 + 64 * 9, 5  # chunks that no number of groups divides
    gpu = 89 if shared_bytes == SMALL else 80
    devices.simt_library().qlora_simt_gpu(gpu, sm_count, shared_bytes, _C.GPU_PANEL_BYTES)
    chosen = _C.cuda_select(m, n, k, str(dtype)[6:], 64, gpu, sm_count, shared_bytes)
    assert (chosen["forward"], chosen["forward_tile"]) == ("gemm", tile)
    weight, dense = weights(n, k)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    of_row = torch.arange(m) % max(1, adapters)
    a, b, s = torch.randn(max(1, adapters), r, k), torch.randn(max(1, adapters), n, r), torch.rand(max(1, adapters))
    if adapters == 0:
        s = s * 0
        y = ops.forward(x, *weight)
        dx = torch.ops.qlora.backward(grad, x, *weight, None, None, 1.0, None, True, False, False, False)[0]
    elif adapters == 1:
        one = a[0], b[0], s.item()
        y = ops.forward(x, *weight, *one)
        dx = torch.ops.qlora.backward(grad, x, *weight, *one, None, True, False, False, False)[0]
    else:
        y = ops.forward_multi(x, *weight, a, b, s, of_row)
        dx = torch.ops.qlora.backward.multi(grad, x, *weight, a, b, s, of_row, True, False, False)[0]
    A, B, S = (t.double()[of_row] for t in (a, b, s))
    for result, given, W, inner, outer in ((y, x, dense, A, B.mT), (dx, grad, dense.T, B.mT, A)):
        X = given.double()
        term = S[:, None] * torch.einsum("mk,mrk,mrn->mn", X, inner, outer)
        products = X.abs() @ W.abs().T + S[:, None] * torch.einsum("mk,mrk,mrn->mn", X.abs(), inner.abs(), outer.abs())
        bound = accumulation(2 * X.shape[1] + 5 * r + 8, products) + operand_rounding(device, dtype, products)
        expected = X @ W.T + term
        assert_within(result, expected, bound + output_rounding(expected.abs() + bound, dtype))
