"""Putting a changed weight back into 4 bit, and the error that it costs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora import _C, reference
from qlora.weight import QuantizedWeight, quantize

# Factors of a block's largest absolute value that a search tries as its scale. Less than one clips the largest weights
# for finer steps elsewhere.
_FACTORS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 1.03)


@dataclass(frozen=True)
class MergeReport:
    """How far a merged weight is from base + adapter in float32, both relative to the norm of the latter."""

    adapter: str
    format: str  # "bfloat16", "nf4", …
    relative_error: float  # of the merged weight, the quantization of the base not counted
    max_abs_error: float


def merge_report(dense: Tensor, exact: Tensor, adapter: str = "") -> MergeReport:
    """The report of a dense merged weight."""
    difference = dense.float() - exact
    relative = (difference.norm() / exact.norm()).item() if exact.any() else 0.0
    largest = difference.abs().max().item() if difference.numel() else 0.0
    return MergeReport(adapter, str(dense.dtype).removeprefix("torch."), relative, largest)


def requantize(
    exact: Tensor, like: QuantizedWeight, *, search_scales: bool = False, adapter: str = ""
) -> tuple[QuantizedWeight, MergeReport]:
    """``exact`` (float32) in the format of ``like``, and the error.

    search_scales: the scale of each block is the one of some around its largest absolute value that leaves the least
    squared error. Takes about twenty times as long.
    """
    weight = quantize(exact, like.quant_type, like.block_size, like.double_quant)
    if search_scales:
        weight = _search(exact, weight)
    weight = replace(weight, dtype=like.dtype)
    return weight, MergeReport(adapter, weight.quant_type, *weight.error_against(exact))


def _search(exact: Tensor, weight: QuantizedWeight) -> QuantizedWeight:
    flat = torch.nn.functional.pad(exact.flatten(), (0, -exact.numel() % weight.block_size))
    blocks = flat.view(-1, weight.block_size)
    largest = blocks.abs().amax(1)
    levels, order = torch.tensor(_C.codebook(weight.quant_type), device=exact.device).sort(stable=True)
    middles = (levels[1:] + levels[:-1]) / 2

    def codes(scale: Tensor) -> Tensor:
        inverse = torch.where(scale > 0, 1 / scale, 0).unsqueeze(1)
        return torch.bucketize(blocks * inverse, middles)

    best, least = largest, torch.full_like(largest, torch.inf)
    for factor in _FACTORS:
        scale = factor * largest
        error = (levels[codes(scale)] * scale.unsqueeze(1) - blocks).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    # Scales first, as they will be decoded; then the nearest level for each weight.
    carrier = torch.zeros_like(blocks)
    carrier[:, 0] = best  # a weight whose blocks have these largest values
    statistics = quantize(carrier, weight.quant_type, weight.block_size, weight.double_quant)
    scales = reference.scales(statistics.absmax, statistics.nested_absmax, statistics.nested_offset)
    chosen = order[codes(scales)].to(torch.uint8).flatten()[: exact.numel()]
    chosen = torch.nn.functional.pad(chosen, (0, exact.numel() % 2))
    found = replace(
        weight,
        packed=chosen[::2] << 4 | chosen[1::2],
        absmax=statistics.absmax,
        nested_absmax=statistics.nested_absmax,
        nested_offset=statistics.nested_offset,
    )
    return found if found.error_against(exact)[0] < weight.error_against(exact)[0] else weight
