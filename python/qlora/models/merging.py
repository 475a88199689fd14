"""Folding the adapters of a whole model into its weights."""

import torch
from torch import nn

from qlora.models.prepare import qlora_layers, replace_module
from qlora.nn import Linear4bit, MergeReport


def merge_and_unload(
    model: nn.Module,
    name: str | None = None,
    *,
    requantize: bool = False,
    dtype: torch.dtype | None = None,
    search_scales: bool = False,
) -> dict[str, MergeReport]:
    """Replaces every :class:`QLoRALinear`, in place, by its merged layer. Without ``requantize`` the whole model is
    dense afterwards: 4-bit layers that have no such adapter are dequantized; with it they stay as they are.

    ``name`` (default: each layer's active adapter), ``requantize``, ``dtype`` and ``search_scales`` as in
    :meth:`QLoRALinear.merge`. Returns the added error of each merged layer by name. Raises ValueError, before anything
    changes, if no layer has the adapter.
    """
    layers = qlora_layers(model)
    adapter_of = {n: name or layer.active_adapter for n, layer in layers.items()}
    merged = {n for n, layer in layers.items() if adapter_of[n] in layer.adapters}
    if not merged:
        raise ValueError(f"{type(model).__name__} has no QLoRALinear with the adapter {name!r}: nothing to merge")
    reports = {
        n: layer.merge(adapter_of[n], requantize=requantize, dtype=dtype, search_scales=search_scales)
        for n, layer in layers.items()
        if n in merged
    }
    for n, layer in layers.items():
        replace_module(model, layer, layer.merged_linear() if n in merged else layer.base)
    if not requantize:
        for module in list(model.modules()):
            if isinstance(module, Linear4bit):
                replace_module(model, module, module.to_linear(dtype))
    return reports
