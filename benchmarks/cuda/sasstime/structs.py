"""Builds the structs of csrc/cuda/launch.h for sasstime: one float32 adapter of rank r, no bias."""

import random
import struct

from sasstime import Buffer

from qlora import FLOAT32, up, weight  # sasstime's own helpers

NO_FACTOR = [None, ("i", 0), ("q", 0), ("q", 0), ("q", 0), ("?", False)]


def factor(name: str, r: int, features: int, rank_is_major: bool, sharers: float = 1.0) -> list:
    """struct LowRankFactor for lora_a [r, features] or lora_b [features, r]."""
    strides = (features, 1) if rank_is_major else (1, r)
    data = Buffer(name, r * features * 4, "float", dram=False, sharers=sharers)
    return [data, ("i", FLOAT32), *(("q", stride) for stride in strides), ("q", 0), ("?", True)]


NO_PLAN = [None, None, None, None, ("q", 0), ("q", 1), None, None, ("q", 0), ("i", 0)]


def most_tiles(m: int, experts: int, tile: int) -> int:
    return up(m, tile) + min(experts + 1, m)


def expert_plan(m: int, experts: int, choices: int, piece: int) -> tuple[list, int, int]:
    """struct AdapterPlan for m rows that go to random experts, the number of experts with rows, and of pieces.

    Specs launch as many blocks as there are pieces: the empty ones after them, which return at once, would mislead the
    model, which carries on the pace of the last blocks that it runs.
    """
    of_row = random.Random(0).choices(range(experts), k=m)
    order, tiles, pieces, active = [], [], [], 0
    for expert in range(experts):
        rows = [row for row in range(m) if of_row[row] == expert]
        active += bool(rows)
        pieces += [len(order) // piece + i for i in range(up(len(rows), piece))]
        order += rows + [-1] * (-len(rows) % 64)
        tiles += [expert] * up(len(rows), 64)
    count, of_pieces = most_tiles(m, experts, 64), most_tiles(m, experts, piece)

    def numbers(name: str, values: list[int], size: int) -> Buffer:
        values = values + [-1] * (size - len(values))
        return Buffer(name, 4 * size, struct.pack(f"{size}i", *values), dram=False)

    x_row = [row // choices if row >= 0 else -1 for row in order]
    lists = [numbers("order", order, 64 * count), numbers("adapter_of_tile", tiles, count), None, None]
    others = [numbers("x_row", x_row, 64 * count), numbers("pieces", pieces, of_pieces)]
    used = len(pieces)
    return [*lists, ("q", count), ("q", experts), *others, ("q", of_pieces), ("i", piece)], active, used


def stack(n: int, k: int, experts: int, sharers: float) -> list:
    """struct WeightView of the first of several weights; each byte is read by `sharers` SMs."""
    packed, absmax, codes, nested, offset, *_, shift, quant_type = weight(n * experts, k, sharers=sharers)
    nested = Buffer(nested.name, experts * up(n * k // 64, 256) * 4, "float", dram=False)
    offset = Buffer(offset.name, experts * 4, "float", dram=False)
    return [packed, absmax, codes, nested, offset, ("q", n), ("q", k), shift, quant_type]


def output(y: Buffer, m: int, rows: int, r: int, rank_is_major: bool = False, plan: list = NO_PLAN) -> list:
    """struct GemmOutput."""
    factor_up = factor("up", r, rows, rank_is_major) if r else NO_FACTOR
    activations = Buffer("activations", m * r * 4, "float", dram=False) if r else None
    return [y, ("q", m), ("q", rows), factor_up, activations, ("i", r), None, ("q", 1), None, ("i", 0), plan]


__all__ = ["NO_FACTOR", "NO_PLAN", "expert_plan", "factor", "most_tiles", "output", "stack"]
