"""Describes the launch of lora_down.cu to sasstime: m k [r=16] [n=0] [tokens]; with n, both jobs of the backward."""

from sasstime import Buffer, Launch
from structs import NO_FACTOR, NO_PLAN, factor

from qlora import BFLOAT16, FLAGS, up  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]


def launch(gpu, m=128, k=4096, r=16, n=0, tokens=0):
    tokens = tokens or (16 if up(m, 16) * up(r, 16) * 2 <= gpu.sms else 32)
    blocks = up(m, tokens)

    def job(name, features, rank_is_major):
        x = Buffer(name, m * features * 2, "bfloat16", dram=False)
        down = factor(f"factor of {name}", r, features, rank_is_major, sharers=blocks)
        return [x, ("q", features), down, Buffer(f"out of {name}", m * r * 4, dram=False), None, None]

    second = job("dy", n, False) if n else [None, ("q", 0), NO_FACTOR, None, None, None]
    scalars = [("i", 2 if n else 1), ("i", BFLOAT16), ("q", m), ("q", r), ("f", 1.0), ("i", tokens)]
    parameters = [[job("x", k, True), second, *scalars, NO_PLAN]]
    grid = (blocks, up(r, 16), 2 if n else 1)
    name = rf"lora_down::kernel<qlora::bf16, {tokens}>"
    warps, flops = 16 if tokens == 16 else 8, 4.0 * blocks * tokens * r * (k + n)
    return Launch(name, grid, 32 * warps, warps * tokens * 16 * 4, parameters, 4 * r * (k + n), flops)
