"""Describes the launch of gemm.cu to sasstime: m n k [r=0] [tile] [experts, choices]; tile is a
name of GemmTile, and with experts m rows go to random ones."""

from sasstime import Buffer, Launch
from structs import NO_PLAN, expert_plan, output, stack

from qlora import BFLOAT16, FLAGS, up, weight_bytes  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]
# GemmTile, then the template arguments of Shape: fragments, warps per group, tokens, stages, groups, panel, batch.
TILES = {
    "turing": (0, 1, 4, 64, 2, 1, 32, 4),
    "64x32": (1, 2, 2, 32, 3, 8, 64, 8),
    "small": (2, 2, 2, 32, 3, 4, 64, 8),
    "64x64": (3, 2, 2, 64, 3, 4, 64, 8),
    "128x64": (4, 2, 4, 64, 2, 2, 64, 8),
}


def launch(gpu, m=64, n=4096, k=4096, r=0, tile="64x32", experts=0, choices=1):
    number, fragments, warps, tokens, stages, groups, panel, batch = TILES[tile]
    rows, threads = 16 * fragments * warps, 32 * warps * groups
    shared = 32 * 1024 + groups * tokens * 128 * stages + rows * (panel | 1) * 4
    plan, active, across = expert_plan(m, experts, choices, tokens) if experts else (NO_PLAN, 1, up(m, tokens))
    grid = (across, up(n, rows), 1)
    x, y = Buffer("x", m // choices * k * 2, "bfloat16", dram=False), Buffer("y", m * n * 2, dram=False)
    w = stack(n, k, max(1, experts), across / active)
    parameters = [w, x, ("i", BFLOAT16), ("i", number), output(y, m, n, r, plan=plan)]
    shape = f"{fragments}, {warps}, {tokens}, {stages}, {groups}, {panel}, {batch}"
    name = (
        rf"gemm::kernel<qlora::bf16, qlora::cuda::gemm::Shape<{shape}>, .qlora::cuda::TokenMode.{2 if experts else 0}>"
    )
    flops = 2.0 * across * tokens * n * k
    floor = active * weight_bytes(n, k) + 2 * m * n
    return Launch(name, grid, threads, shared, [[*parameters, ("f", 1.0), ("f", 1.0)]], floor, flops)
