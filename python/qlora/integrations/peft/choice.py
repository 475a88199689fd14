"""Chooses the fused LoRA layer for a 4-bit layer, where PEFT makes its own."""

from typing import Any

from torch import nn

from qlora.integrations.peft.layers import LoraEmbedding4bit, LoraExperts4bit, LoraLinear4bit
from qlora.nn import Embedding4bit, Experts4bit, Linear4bit

_LAYERS: dict[type, Any] = {Linear4bit: LoraLinear4bit, Embedding4bit: LoraEmbedding4bit}


def create_module(adapter_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for ``target``, or None if ``target`` is not a layer of qlora. PEFT's model calls this first."""
    base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if kwargs.get("parameter_name") is not None:
        if isinstance(base, Experts4bit):
            return LoraExperts4bit(target, adapter_name, adapter_config, **kwargs)
        if isinstance(base, tuple(_LAYERS)):
            raise ValueError(
                f"target_parameters: name the layer of '{kwargs['target_name']}' in target_modules instead"
            )
        return None
    for kind, layer in _LAYERS.items():
        if isinstance(base, kind):
            return layer(target, adapter_name, adapter_config, **kwargs)
    return None
