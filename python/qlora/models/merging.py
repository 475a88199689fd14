"""Folding the adapters of a whole model into its weights."""

import torch
from torch import nn

from qlora.models.prepare import qlora_layers
from qlora.nn import MergeReport


def merge_and_unload(
    model: nn.Module, name: str | None = None, *, requantize: bool = False, dtype: torch.dtype | None = None
) -> dict[str, MergeReport]:
    """Replaces every :class:`QLoRALinear`, in place, by its merged layer: dense ``nn.Linear``, or 4-bit with
    requantize.

    ``name`` and ``dtype`` as in :meth:`QLoRALinear.merge`. Returns the added error of each layer by name.
    """
    reports = {}
    for layer_name, layer in qlora_layers(model).items():
        reports[layer_name] = layer.merge(name, requantize=requantize, dtype=dtype)
        path, _, leaf = layer_name.rpartition(".")
        setattr(model.get_submodule(path), leaf, layer.merged_linear())
    if not reports:
        raise ValueError(f"{type(model).__name__} has no QLoRALinear: nothing to merge")
    return reports
