"""The arithmetic of adapters that every layer shares: what an adapter adds to a weight, putting the sum back into a
layer, dense or in 4 bit, and the error that this costs."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora import _C
from qlora.tables import scales as scales_of
from qlora.tables import table
from qlora.weight import QuantizedWeight, quantize

# Factors of a block's largest absolute value that a search tries as its scale. Less than one clips the largest weights
# for finer steps elsewhere.
_FACTORS = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 1.03)


@dataclass(frozen=True)
class MergeReport:
    """How far a merged weight is from base + adapter in float32, both errors relative to the norm of the latter, and
    how much of the adapter it has."""

    adapter: str
    format: str  # "bfloat16", "nf4", …
    relative_error: float  # of the merged weight, the quantization of the base not counted
    max_abs_error: float
    # Of what the adapter changes, along it: <merged - base, D> / <D, D>, D = exact - base. 1: all of it. In 4 bit far
    # less: the base lies on the grid, and rounding takes back what is smaller than half a step.
    adapter_kept: float


@dataclass(frozen=True)
class MergeInto:
    """What a merged weight becomes.

    Args:
        requantize: the 4-bit format of the base; else a dense weight.
        dtype: of the dense weight; None: what the base had before it was quantized.
        search_scales: with ``requantize``, search the scale of each block for the least squared error.

    Raises ValueError for options that contradict each other.
    """

    requantize: bool = False
    dtype: torch.dtype | None = None
    search_scales: bool = False

    def __post_init__(self) -> None:
        if self.requantize and self.dtype is not None:
            raise ValueError(f"dtype={self.dtype} contradicts requantize=True, which stores 4 bit")
        if self.search_scales and not self.requantize:
            raise ValueError("search_scales=True needs requantize=True: a dense weight has no scales")


def low_rank_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """What an adapter adds to a weight: ``scaling * b @ a`` in float32, (…, out, in) of a (…, r, in), b (…, out, r)."""
    return scaling * (b.float() @ a.float())


def merged_weight(
    exact: Tensor, like: QuantizedWeight, into: MergeInto, adapter: str = ""
) -> tuple[Tensor | QuantizedWeight, MergeReport]:
    """``exact`` (float32) in the form that ``into`` says, and what that costs; ``like`` is the base's weight."""
    if into.requantize:
        weight = requantize(exact, like, search_scales=into.search_scales)
        return weight, _report(weight.dequantize(torch.float32), exact, like, weight.quant_type, adapter)
    dense = exact.to(into.dtype or like.dtype)
    return dense, _report(dense.float(), exact, like, str(dense.dtype).removeprefix("torch."), adapter)


def _report(merged: Tensor, exact: Tensor, like: QuantizedWeight, name: str, adapter: str) -> MergeReport:
    difference = merged - exact
    size, wrong = exact.norm(), difference.norm()
    largest = difference.abs().max().item() if difference.numel() else 0.0
    change = exact - like.dequantize(torch.float32)
    # merged - base is difference + change.
    squares = change.square().sum(dtype=torch.float64)
    lost = (difference * change).sum(dtype=torch.float64)
    kept = (1 + lost / squares).item() if squares != 0 else 1.0  # nan stays nan
    return MergeReport(adapter, name, (wrong / size).item() if size != 0 else 0.0, largest, kept)


def requantize(exact: Tensor, like: QuantizedWeight, *, search_scales: bool = False) -> QuantizedWeight:
    """``exact`` (float32) in the format of ``like``.

    search_scales: the scale of each block is the one of some around its largest absolute value that leaves the least
    squared error. Takes about twenty times as long.
    """
    weight = quantize(exact, like.quant_type, like.block_size, like.double_quant)
    if search_scales:
        weight = _search(exact, weight)
    return replace(weight, dtype=like.dtype)


def _search(exact: Tensor, weight: QuantizedWeight) -> QuantizedWeight:
    flat = torch.nn.functional.pad(exact.flatten(), (0, -exact.numel() % weight.block_size))
    blocks = flat.view(-1, weight.block_size)
    largest = blocks.abs().amax(1)
    levels, order = table(_C.codebook(weight.quant_type), exact).sort(stable=True)
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
    scales = scales_of(statistics.absmax, statistics.nested_absmax, statistics.nested_offset)
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
