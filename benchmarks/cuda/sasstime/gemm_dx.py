"""Describes the launch of gemm_dx.cu to sasstime: m n k [r=0] [tile] [experts, choices]; tile is a
name of GemmTile, and with experts m rows go to random ones."""

from sasstime import Buffer, Launch
from structs import NO_PLAN, expert_plan, output, stack

from qlora import BFLOAT16, FLAGS, up, weight_bytes  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]
# GemmTile, then the template arguments of Shape: warps per group, tokens, groups.
TILES = {
    "turing": (0, 4, 64, 1),
    "64x32": (1, 2, 32, 8),
    "small": (2, 2, 32, 4),
    "64x64": (3, 2, 64, 4),
    "128x64": (4, 4, 64, 2),
}


def launch(gpu, m=64, n=4096, k=4096, r=0, tile="64x32", experts=0, choices=1):
    number, warps, tokens, groups = TILES[tile]
    features, threads = 32 * warps, 32 * warps * groups
    stage = 64 * 16 * warps + (128 if warps == 2 else 0)
    shared = 32 * 1024 + groups * 2 * (tokens * 128 + stage + warps * 64 * 4)
    plan, active, across = expert_plan(m, experts, choices, tokens) if experts else (NO_PLAN, 1, up(m, tokens))
    grid = (across, up(k, features), 1)
    dy, dx = Buffer("dy", m * n * 2, "bfloat16", dram=False), Buffer("dx", m * k * 2, dram=False)
    parameters = [
        stack(n, k, max(1, experts), across / active),
        dy,
        ("i", BFLOAT16),
        ("i", number),
        output(dx, m, k, r, rank_is_major=True, plan=plan),
    ]
    shape, mode = f"{warps}, {tokens}, {groups}", 2 if experts else 0
    name = rf"gemm_dx::kernel<qlora::bf16, qlora::cuda::gemm_dx::Shape<{shape}>, .qlora::cuda::TokenMode.{mode}>"
    flops = 2.0 * across * tokens * n * k
    return Launch(name, grid, threads, shared, [parameters], active * weight_bytes(n, k) + 2 * m * k, flops)
