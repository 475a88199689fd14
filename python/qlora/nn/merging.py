"""Merges an adapter into a weight, dense or in 4 bit, and measures the error of the result."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora.weight import QuantizedWeight, quantize, quantize_to_searched_scales


@dataclass(frozen=True)
class MergeReport:
    """The errors of a merged weight against base + adapter in float32, and the share of the adapter that it keeps.

    Both errors are relative to the norm of base + adapter.
    """

    adapter: str
    format: str  # "bfloat16", "nf4", …
    relative_error: float  # of the merged weight; excludes the quantization error of the base
    max_abs_error: float
    # The kept share of the adapter's change D = exact - base: <merged - base, D> / <D, D>; 1 keeps all. Far less in 4
    # bit: the base lies on the quantization grid, so rounding undoes changes smaller than half a step. With calibration
    # the same share of the outputs for unseen tokens, where D is what the adapter adds to them.
    adapter_kept: float


@dataclass(frozen=True)
class MergeInto:
    """The format of a merged weight.

    Args:
        requantize: use the base's 4-bit format instead of a dense weight.
        dtype: dtype of the dense weight; None takes the base's dtype before quantization.
        search_scales: with ``requantize``, search the scale of each block for the least squared error.

    Raises ValueError for options that contradict each other.
    """

    requantize: bool = False
    dtype: torch.dtype | None = None
    search_scales: bool = False

    def __post_init__(self) -> None:
        if self.requantize and self.dtype is not None:
            raise ValueError(f"dtype={self.dtype} contradicts requantize=True, which stores 4-bit weights")
        if self.search_scales and not self.requantize:
            raise ValueError("search_scales=True needs requantize=True: a dense weight has no scales")


def low_rank_delta(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """An adapter's change of a weight, ``scaling * b @ a``: float32 (…, out, in) for a (…, r, in), b (…, out, r)."""
    return scaling * (b.float() @ a.float())


def merged_weight(
    exact: Tensor, like: QuantizedWeight, into: MergeInto, adapter: str = ""
) -> tuple[Tensor | QuantizedWeight, MergeReport]:
    """Stores ``exact`` (float32) in the format ``into``, and reports the error; ``like`` is the base's weight."""
    if into.requantize:
        weight = requantize(exact, like, search_scales=into.search_scales)
        return weight, merge_report(weight.dequantize(torch.float32), exact, like, weight.quant_type, adapter)
    dense = exact.to(into.dtype or like.dtype)
    return dense, merge_report(dense.float(), exact, like, str(dense.dtype).removeprefix("torch."), adapter)


def merge_report(merged: Tensor, exact: Tensor, like: QuantizedWeight, name: str, adapter: str = "") -> MergeReport:
    """The errors of ``merged`` against ``exact``, float32 each; ``like`` is the base, ``name`` the merged format."""
    difference = merged - exact
    size, wrong = exact.norm(), difference.norm()
    largest = difference.abs().max().item() if difference.numel() else 0.0
    change = exact - like.dequantize(torch.float32)
    # merged - base = difference + change
    squares = change.square().sum(dtype=torch.float64)
    lost = (difference * change).sum(dtype=torch.float64)
    kept = (1 + lost / squares).item() if squares != 0 else 1.0  # nan stays nan
    return MergeReport(adapter, name, (wrong / size).item() if size != 0 else 0.0, largest, kept)


def requantize(exact: Tensor, like: QuantizedWeight, *, search_scales: bool = False) -> QuantizedWeight:
    """``exact`` (float32) in the format of ``like``.

    search_scales: for each block try several scales around its largest absolute value and keep the one with the least
    squared error.
    """
    weight = quantize(exact, like.quant_type, like.block_size, like.double_quant)
    if search_scales:
        weight = _search(exact, weight)
    return replace(weight, dtype=like.dtype)


def _search(exact: Tensor, weight: QuantizedWeight) -> QuantizedWeight:
    matrix = exact.reshape(exact.shape[0], -1)
    found = quantize_to_searched_scales(matrix, torch.ones_like(matrix[0]), weight)
    return found if found.error_against(exact)[0] < weight.error_against(exact)[0] else weight
