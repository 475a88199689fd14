"""Merges the adapters of a whole model, qlora's or PEFT's, into its weights."""

import warnings
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from qlora.adapters.files import allow_saving
from qlora.adapters.masters import back_to_16_bit
from qlora.nn import MergeReport
from qlora.nn.finding import qlora_layers
from qlora.nn.merging import MergeInto
from qlora.nn.replacing import replace_module

_WORTH_SAYING = 0.9  # warns if less than this share of the adapter is kept


class Merged(NamedTuple):
    """Result of :func:`merge_and_unload`."""

    model: nn.Module
    reports: dict[str, MergeReport]  # errors of the merged weights, by layer name in ``model``

    @property
    def adapter_kept(self) -> float:
        """The share of the adapter's change that the merged weights keep: the median over layers."""
        return median(report.adapter_kept for report in self.reports.values()) if self.reports else 1.0


def merge_and_unload(
    model: nn.Module,
    name: str | Sequence[str] | None = None,
    *,
    requantize: bool = False,
    dtype: torch.dtype | None = None,
    search_scales: bool = False,
    safe_merge: bool = False,
) -> Merged:
    """Merges each adapter into its layer and removes it. Takes a model of :func:`qlora.prepare_model` or a PeftModel.

    Without ``requantize`` the whole model becomes dense, including embeddings, experts and 4-bit layers without this
    adapter, and can be saved and loaded as a dense model. With ``requantize`` merged layers are 4-bit again, and
    rounding undoes most of a small adapter; a warning says how much is kept.

    Args:
        name: the adapter (default: each layer's active one); for a PeftModel also a list of several.
        requantize, dtype, search_scales: see :class:`qlora.nn.merging.MergeInto`.
        safe_merge: for a PeftModel: raise an error if an adapter makes a weight nan or inf.

    Works in place; for a PeftModel it returns the model that was wrapped. Raises ValueError, before anything changes,
    if no layer has the adapter.
    """
    from qlora.integrations.transformers import make_dense

    into = MergeInto(requantize, dtype, search_scales)
    if hasattr(model, "peft_config"):
        from qlora.integrations.peft import merge_peft

        names = [name] if isinstance(name, str) else None if name is None else list(name)
        merged, reports = merge_peft(model, into, names, safe_merge)
        back_to_16_bit(merged)
    else:
        if safe_merge or not (name is None or isinstance(name, str)):
            raise ValueError("safe_merge and several adapters need a PeftModel: this model has no PEFT adapters")
        merged, reports = model, _merge_prepared(model, into, name)
        if not requantize:
            allow_saving(model)
    quantizer: Any = getattr(merged, "hf_quantizer", None)
    if not requantize:
        make_dense(merged, dtype)
        if quantizer is not None:
            quantizer.remove_quantization_config(merged)
    elif quantizer is not None:
        quantizer.has_adapters = False
        allow_saving(merged)
    result = Merged(merged, reports)
    if requantize and not result.adapter_kept >= _WORTH_SAYING:
        warnings.warn(
            f"merged into 4 bit, the weights keep {result.adapter_kept:.0%} of what the adapter changes (median of"
            f" {len(reports)} layers): rounding to the base's grid undoes the rest. Merge without requantize, or"
            " keep the adapter beside its base",
            stacklevel=2,
        )
    return result


def _merge_prepared(model: nn.Module, into: MergeInto, name: str | None) -> dict[str, MergeReport]:
    layers = qlora_layers(model)
    adapter_of = {n: name or layer.active_adapter for n, layer in layers.items()}
    merged = {n for n, layer in layers.items() if adapter_of[n] in layer.adapters}
    if not merged:
        raise ValueError(f"{type(model).__name__} has no QLoRALinear with the adapter {name!r}: nothing to merge")
    options: dict[str, Any] = {
        "requantize": into.requantize,
        "dtype": into.dtype,
        "search_scales": into.search_scales,
    }
    reports = {n: layer.merge(adapter_of[n], **options) for n, layer in layers.items() if n in merged}
    for n, layer in layers.items():
        replace_module(model, layer, layer.merged_linear() if n in merged else layer.base)
    return reports
