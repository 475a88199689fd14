"""The 4-bit layers of a transformers model by name, their tensors, and dense layers in their place."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora.nn import Embedding4bit, Experts4bit, Linear4bit
from qlora.nn.packed import STATISTICS
from qlora.nn.replacing import replace_module
from qlora.weight import QuantizedWeight


def quantized_layers(model: Any) -> Iterator[tuple[str, Linear4bit | Experts4bit]]:
    """All 4-bit layers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Experts4bit):
            yield name, module


def own_tensors(name: str, module: Linear4bit | Experts4bit) -> Iterator[tuple[str, Tensor]]:
    weights = module.weight_names if isinstance(module, Experts4bit) else ["weight"]
    for weight in weights:
        yield f"{name}.{weight}", getattr(module, weight)
        for statistic in STATISTICS:
            leaf = f"{weight}_{statistic}" if isinstance(module, Experts4bit) else statistic
            yield f"{name}.{leaf}", getattr(module, leaf)


def layer_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a Linear4bit, by their names in its state dict."""
    n, k = weight.shape
    packed = weight.packed.view(n, k // 2) if k % 2 == 0 else weight.packed
    return {"weight": packed, **{name: getattr(weight, name) for name in STATISTICS}}


def make_dense(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    kinds: tuple[type[nn.Module], ...] = (Linear4bit, Experts4bit, Embedding4bit),
) -> None:
    """Replaces 4-bit layers by dense ones, in ``dtype`` (default: their dtype before quantization).

    ``kinds``: the classes of layers to replace; all by default.
    """
    for module in list(model.modules()):
        if not isinstance(module, kinds):
            continue
        if isinstance(module, Experts4bit):
            replace_module(model, module, module.to_experts(dtype))
        elif isinstance(module, Linear4bit):
            replace_module(model, module, module.to_linear(dtype))
        elif isinstance(module, Embedding4bit):
            replace_module(model, module, module.to_embedding(dtype))
