"""Describes the launch of gemv.cu to sasstime, a timing model of SASS: m (1 to 16) n k [rows of a block, 16 or 32]
[experts, choices, row_blocks]; with experts m rows, of any number, go to random ones."""

from sasstime import Buffer, Launch
from structs import NO_PLAN, expert_plan, stack

from qlora import BFLOAT16, FLAGS, up, weight, weight_bytes  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]
WARPS, TABLE_BYTES, LONGEST = 4, 32 * 1024, 256


def shared_bytes(rows, m, panel):
    return TABLE_BYTES + WARPS * (5 if m <= 8 else 3) * (32 * rows + 128 * m) + 4 * rows * (panel | 1)


def tile(m, n, k, gpu, rows):
    """select_gemv_tile()."""
    chunks = k // 64
    rows = rows or (32 if m > 8 and gpu.shared_per_block >= 160 * 1024 and n >= 24 * gpu.sms else 16)
    while True:
        longest = min((gpu.shared_per_block - shared_bytes(rows, m, 0)) // (4 * rows), LONGEST)
        panel = chunks if chunks <= longest else longest // WARPS * WARPS
        if panel == chunks or panel >= 16 or rows == 16:
            return rows, panel
        rows //= 2


def launch(gpu, m=1, n=4096, k=4096, rows=0, experts=0, choices=1, row_blocks=0):
    if experts:
        return launch_experts(gpu, m, n, k, experts, choices, row_blocks)
    rows, panel = tile(m, n, k, gpu, rows)
    x, y = Buffer("x", m * k * 2, "bfloat16", dram=False), Buffer("y", m * n * 2, dram=False)
    no_adapter = [None, None, ("i", BFLOAT16), ("q", 0), None, ("q", 1), ("q", 0), ("B", 0)]
    results = [None, ("i", 0), y, [("i", rows), ("i", panel)], ("f", 1.0), ("f", 1.0)]
    parameters = [[weight(n, k), x, ("i", BFLOAT16), ("q", m), *no_adapter, *results, NO_PLAN, ("q", 0)]]
    tokens = 8 if m <= 8 else 16
    name = rf"gemv::kernel<qlora::bf16, {rows // 16}, {tokens}, \d, false>"
    shared, flops = shared_bytes(rows, m, panel), 2.0 * tokens * n * k
    return Launch(name, (up(n, rows), 1, 1), 32 * WARPS, shared, parameters, weight_bytes(n, k), flops)


def launch_experts(gpu, m, n, k, experts, choices, row_blocks):
    piece, (_, panel) = 8, tile(8, n, k, gpu, 16)
    plan, active, pieces = expert_plan(m, experts, choices, piece)
    groups = up(n, 16)
    if not row_blocks:  # select_gemv_row_blocks()
        active_most = min(experts, m)
        wanted = up(12 * gpu.sms, max(active_most, (m + active_most * piece // 2) // piece))
        row_blocks = up(groups, up(groups, wanted))
    x, y = Buffer("x", m // choices * k * 2, "bfloat16", dram=False), Buffer("y", m * n * 2, dram=False)
    no_adapter = [None, None, ("i", BFLOAT16), ("q", 0), None, ("q", experts), ("q", 0), ("B", 0)]
    results = [None, ("i", 0), y, [("i", 16), ("i", panel)], ("f", 1.0), ("f", 1.0)]
    w = stack(n, k, experts, 1.0)
    parameters = [[w, x, ("i", BFLOAT16), ("q", piece), *no_adapter, *results, plan, ("q", row_blocks)]]
    grid = (row_blocks, pieces, 1)
    floor, flops = active * weight_bytes(n, k), 2.0 * active * piece * n * k
    return Launch(
        r"gemv::kernel<qlora::bf16, 1, 8, 5, true>",
        grid,
        32 * WARPS,
        shared_bytes(16, piece, panel),
        parameters,
        floor,
        flops,
    )
