"""Folding the adapters of a whole model into its weights, ours and PEFT's."""

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

_WORTH_SAYING = 0.9  # of the adapter


class Merged(NamedTuple):
    """What :func:`merge_and_unload` returns."""

    model: nn.Module
    reports: dict[str, MergeReport]  # by the layer's name in ``model``: what its merged form costs

    @property
    def adapter_kept(self) -> float:
        """Of what the adapter changes, the share that is in the merged weights: the median of the layers."""
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
    """The model without adapters, each folded into its layer: of :func:`qlora.prepare_model`, or a PeftModel.

    Without ``requantize`` the whole model is dense afterwards, also its 4-bit layers that have no such adapter,
    embeddings and experts included; it is saved and loaded as a dense model. With it merged layers are in 4 bit again,
    and rounding takes back most of a small adapter: a warning says how much is kept.

    Args:
        name: the adapter; default: each layer's active one. A PeftModel takes several.
        requantize, dtype, search_scales: see :class:`qlora.nn.merging.MergeInto`.
        safe_merge: of a PeftModel: an adapter that makes a weight nan or inf is an error.

    Works in place, but for a PeftModel, which wraps the model that is returned. Raises ValueError, before anything
    changes, if no layer has the adapter.
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
            raise ValueError("safe_merge and several adapters are for PEFT's models: this one has none of PEFT")
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
            f" {len(reports)} layers): rounding to the base's grid takes the rest back. Merge without requantize, or"
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
