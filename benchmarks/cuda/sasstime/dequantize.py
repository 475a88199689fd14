"""Describes the launch of dequantize.cu to sasstime, a timing model of SASS: n k [out_in_dram=1], to bfloat16."""

from sasstime import Buffer, Launch

from qlora import BFLOAT16, FLAGS, up, weight, weight_bytes  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]
PER_BLOCK = 1024 * 4 * 8  # weights per warp and round, times rounds, times warps


def launch(gpu, n=4096, k=4096, out_in_dram=1):
    out = Buffer("out", n * k * 2, dram=bool(out_in_dram))
    parameters = [[weight(n, k), ("q", 0), ("q", 1), ("q", n * k), ("q", k), out, ("i", BFLOAT16)]]
    moved = weight_bytes(n, k) + (2 * n * k if out_in_dram else 0)
    grid = (up(n * k, PER_BLOCK), 1, 1)
    return Launch(r"dequantize::kernel<qlora::bf16>", grid, 256, 32 * 1024, parameters, moved)
