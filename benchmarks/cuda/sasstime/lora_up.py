"""Describes the launch of lora_up.cu to sasstime: m n [r=16], for the low-rank term that the vendor's GEMM adds to."""

from sasstime import Buffer, Launch
from structs import output

from qlora import BFLOAT16, FLAGS, up  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]


def launch(gpu, m=2048, n=4096, r=16):
    y = Buffer("y", m * n * 2, dram=False)
    parameters = [[("i", BFLOAT16), output(y, m, n, r)]]
    return Launch(
        r"lora_up::kernel<qlora::bf16>", (up(m, 64), up(n, 128), 1), 128, 0, parameters, 2 * m * n, 6.0 * m * r * n
    )
