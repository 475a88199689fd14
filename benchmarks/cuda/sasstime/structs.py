"""Builds the structs of csrc/cuda/launch.h for sasstime: one float32 adapter of rank r, no bias."""

from sasstime import Buffer

from qlora import FLOAT32, plan  # sasstime's own helpers

NO_FACTOR = [None, ("i", 0), ("q", 0), ("q", 0), ("q", 0), ("?", False)]


def factor(name: str, r: int, features: int, rank_is_major: bool, sharers: float = 1.0) -> list:
    """struct LowRankFactor for lora_a [r, features] or lora_b [features, r]."""
    strides = (features, 1) if rank_is_major else (1, r)
    data = Buffer(name, r * features * 4, "float", dram=False, sharers=sharers)
    return [data, ("i", FLOAT32), *(("q", stride) for stride in strides), ("q", 0), ("?", True)]


def output(y: Buffer, m: int, rows: int, r: int, rank_is_major: bool = False) -> list:
    """struct GemmOutput."""
    up = factor("up", r, rows, rank_is_major) if r else NO_FACTOR
    activations = Buffer("activations", m * r * 4, "float", dram=False) if r else None
    return [y, ("q", m), ("q", rows), up, activations, ("i", r), None, ("q", 1), None, ("i", 0)]


__all__ = ["NO_FACTOR", "factor", "output", "plan"]
