"""Describes the launch of gemm_dx.cu to sasstime: m n k [r=0] [tile]; tile is a name of GemmTile."""

from sasstime import Buffer, Launch
from structs import output

from qlora import BFLOAT16, FLAGS, up, weight, weight_bytes  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]
# GemmTile, then the template arguments of Shape: warps per group, tokens, groups.
TILES = {
    "turing": (0, 4, 64, 1),
    "64x32": (1, 2, 32, 8),
    "small": (2, 2, 32, 4),
    "64x64": (3, 2, 64, 4),
    "128x64": (4, 4, 64, 2),
}


def launch(gpu, m=64, n=4096, k=4096, r=0, tile="64x32"):
    number, warps, tokens, groups = TILES[tile]
    features, threads = 32 * warps, 32 * warps * groups
    stage = 64 * 16 * warps + (128 if warps == 2 else 0)
    shared = 32 * 1024 + groups * 2 * (tokens * 128 + stage + warps * 64 * 4)
    grid = (up(m, tokens), up(k, features), 1)
    dy, dx = Buffer("dy", m * n * 2, "bfloat16", dram=False), Buffer("dx", m * k * 2, dram=False)
    parameters = [
        weight(n, k, sharers=grid[0]),
        dy,
        ("i", BFLOAT16),
        ("i", number),
        output(dx, m, k, r, rank_is_major=True),
    ]
    name = rf"gemm_dx::kernel<qlora::bf16, qlora::cuda::gemm_dx::Shape<{warps}, {tokens}, {groups}>, false>"
    flops = 2.0 * grid[0] * tokens * n * k
    return Launch(name, grid, threads, shared, [parameters], weight_bytes(n, k) + 2 * m * k, flops)
