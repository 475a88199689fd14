"""Whole PeftModels: merging, LoftQ's initialization, an adapter for each sample of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qlora.integrations.peft.layers import LoraEmbedding4bit, LoraExperts4bit, LoraLinear4bit
from qlora.nn import MergeReport
from qlora.nn.merging import MergeInto
from qlora.nn.merging import requantize as to_format
from qlora.storage.weights import WeightSource


def lora_layers(model: nn.Module) -> dict[str, LoraLinear4bit]:
    """All fused LoRA layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear4bit)}


def merge_peft(
    model: Any, into: MergeInto, adapter_names: list[str] | None, safe_merge: bool
) -> tuple[nn.Module, dict[str, MergeReport]]:
    """``model.merge_and_unload()`` of a PeftModel, with 4-bit layers in the format ``into``.

    :func:`qlora.merge_and_unload` calls it. Raises ValueError if no layer has one of the adapters.
    """
    names = set(adapter_names or model.active_adapters)
    layers_of_peft = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if not any(names & set(layer._get_available_adapters()) for layer in layers_of_peft):
        raise ValueError(f"{type(model).__name__} has no layer with an adapter of {sorted(names)}: nothing to merge")
    layers = lora_layers(model)
    experts: list[Any] = [module for module in model.modules() if isinstance(module, LoraExperts4bit)]
    for layer in [*experts, *layers.values()]:
        layer.merge_into = into
    merged = model.merge_and_unload(safe_merge=safe_merge, adapter_names=adapter_names)
    prefix = "base_model.model."
    reports = {n.removeprefix(prefix): r for n, r in ((n, m.merge_report) for n, m in layers.items()) if r is not None}
    return merged, reports


@torch.no_grad()
def initialize_loftq(
    model: nn.Module, weights: str | Path | dict[str, Tensor], *, adapter: str = "default", iterations: int = 1
) -> dict[str, float]:
    """LoftQ (Li et al. 2023): changes base and adapter so that together they approximate the original dense weights.

    Alternates quantizing ``W - sBA`` and a truncated SVD of the quantization error.

    Args:
        model: a PeftModel whose base has qlora's 4-bit layers.
        weights: the dense weights by their names in the base model: a safetensors file, a folder, or a mapping.
        adapter: name of the adapter.
        iterations: number of alternations.

    Returns for each layer the error ``|W - Q - sBA|`` divided by ``|W - Q|`` of plain quantization.
    """
    source = weights if isinstance(weights, dict) else None
    reader = WeightSource(weights) if source is None else WeightSource(source)
    ratios = {}
    for name, layer in lora_layers(model).items():
        if adapter not in layer.lora_A:
            continue
        key = name.removeprefix("base_model.model.") + ".weight"
        dense = reader.read(key).float().to(layer.quantized.weight.device)
        scaling, rank = layer.scaling[adapter], layer.r[adapter]
        base, format_ = layer.quantized, layer.quantized.quantized_weight
        plain = (dense - to_format(dense, format_).dequantize(torch.float32)).norm()
        low_rank = torch.zeros_like(dense)
        for _ in range(iterations):
            quantized = to_format(dense - low_rank, format_)
            left = dense - quantized.dequantize(torch.float32)
            u, s, v = torch.linalg.svd(left, full_matrices=False)
            root = (s[:rank] / scaling).sqrt()
            a, b = root.unsqueeze(1) * v[:rank], u[:, :rank] * root
            low_rank = scaling * b @ a
        base.adopt(quantized)
        layer.lora_A[adapter].weight.copy_(a)
        layer.lora_B[adapter].weight.copy_(b)
        layer._row_squares = None
        ratios[name] = ((left - low_rank).norm() / plain).item() if plain > 0 else 1.0
    return ratios


@contextmanager
def mixed_adapters(model: nn.Module, adapter_names: list[str]) -> Iterator[None]:
    """Runs each sample of a batch through its own adapter inside a ``with`` block, also in training.

    PEFT's argument ``adapter_names`` refuses training. With activation checkpointing the block must include the
    backward. ``adapter_names`` has one name per sample, "__base__" for no adapter. Raises ValueError for an unknown
    name.
    """
    known = {name for layer in lora_layers(model).values() for name in layer.lora_A} | {"__base__"}
    unknown = sorted(set(adapter_names) - known)
    if unknown:
        raise ValueError(f"no layer has the adapters {unknown}: the model has {sorted(known)}")

    def give_names(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "adapter_names": adapter_names}

    layers = (m for m in model.modules() if isinstance(m, LoraLinear4bit | LoraEmbedding4bit))
    hooks = [layer.register_forward_pre_hook(give_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
