"""Describes the launch of lora_grad.cu to sasstime: m n k [r=16] [parts], for both gradients of float32 adapters."""

from sasstime import Buffer, Launch
from structs import NO_PLAN

from qlora import BFLOAT16, FLAGS, up  # sasstime's own helpers

__all__ = ["FLAGS", "launch"]


def launch(gpu, m=512, n=4096, k=4096, r=16, parts=0):
    ranks = 16 if r <= 16 else 32 if r <= 32 else 64
    wide = 128 if ranks == 64 else 256

    def job(name, features, rank_is_major):
        own = parts or max(1, min(up(2 * gpu.sms, up(features, wide) * up(r, ranks)), m // 64, 64))
        x = Buffer(name, m * features * 2, "bfloat16", dram=False)
        activations = Buffer(f"activations of {name}", m * r * 4, "float", dram=False)
        out = Buffer(f"out of {name}", own * r * features * 4, dram=False)
        strides = (features, 1) if rank_is_major else (1, r)
        return [x, ("q", features), activations, None, ("i", own), out, *(("q", s) for s in strides), None], own

    (first, a), (second, b) = job("x", k, True), job("dy", n, False)
    scalars = [("i", 2), ("i", BFLOAT16), ("q", m), ("q", r), ("?", True), ("i", ranks)]
    grid = (up(max(n, k), wide), 2 * max(a, b), up(r, ranks))
    shared = 3 * 64 * 128 + 4 * ranks * 128
    name = rf"lora_grad::kernel<qlora::bf16, {ranks}>"
    return Launch(name, grid, 128, shared, [[first, second, *scalars, NO_PLAN]], 2 * m * (n + k), 4.0 * m * r * (n + k))
