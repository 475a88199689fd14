"""The dense weights of a model by name, read one at a time: of a checkpoint, of a 4-bit model, of a PeftModel."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.adapters.files import PEFT_PREFIX
from qlora.nn import Embedding4bit, Experts4bit, Linear4bit
from qlora.storage.weights import WeightSource


class DenseWeight(NamedTuple):
    """A tensor that is computed or read from its file when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # a float tensor of that shape, on the CPU; the caller must not change it


def checkpoint_weights(folder: Path) -> dict[str, DenseWeight]:
    """The tensors of a dense checkpoint, by their names in its files; each is mapped from its file when read."""
    source = WeightSource(folder)
    return {
        name: DenseWeight(tuple(source.read(name).shape), partial(source.read, name)) for name in sorted(source.names)
    }


def model_weights(model: nn.Module) -> dict[str, DenseWeight]:
    """The weights of a loaded model, dense, by their names in a dense model.

    4-bit weights are dequantized in float32. Of a PeftModel the active adapters are added in float32, ``base + scaling
    * B A``, and trained copies (modules_to_save) take the place of their originals. Nothing in the model changes.

    Raises ValueError for what has no single dense weight: experts in 4 bit, and adapters of PEFT other than LoRA and
    DoRA on 4-bit layers, LoRA on dense ones.
    """
    found: dict[str, DenseWeight] = {}
    for name, weight in _walk(model, ""):
        found[name.removeprefix(PEFT_PREFIX)] = weight
    return found


def _walk(module: Any, name: str) -> Iterator[tuple[str, DenseWeight]]:
    adapted = _adapted(module, name)
    if adapted is not None:
        yield from adapted
        return
    if isinstance(module, Experts4bit):
        raise ValueError(f"{name} has experts in 4 bit: only models without experts can be read weight by weight")
    if isinstance(module, Linear4bit | Embedding4bit):
        yield from _layer(name, module, lambda: module.dequantize(torch.float32))
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        yield _join(name, leaf), _stored(parameter)
    for leaf, child in module.named_children():
        yield from _walk(child, _join(name, leaf))


def _adapted(module: Any, name: str) -> Iterator[tuple[str, DenseWeight]] | None:
    """The weights of a wrapper of PEFT; None for any other module."""
    if not hasattr(module, "active_adapters") or name == "":
        return None
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    from qlora.integrations.peft.layers import LoraLinear4bit

    if isinstance(module, ModulesToSaveWrapper):
        active = [a for a in module.active_adapters if a in module.modules_to_save]
        return _walk(module.modules_to_save[active[0]] if active else module.original_module, name)
    if not isinstance(module, BaseTunerLayer):
        return None
    if module.merged_adapters:
        raise ValueError(f"{name} has a merged adapter: call unmerge_adapter() first")
    if isinstance(module, LoraLinear4bit):
        names = [a for a in module.active_adapters if a in module.lora_A]
        return _layer(name, module.quantized, partial(module.exact_weight, names), _lora_bias(module, names))
    if isinstance(module, Linear | Embedding) and not module.lora_variant:
        factors = module.lora_A if isinstance(module, Linear) else module.lora_embedding_A
        names = [a for a in module.active_adapters if a in factors]
        base = module.get_base_layer()
        if isinstance(base, nn.Linear | nn.Embedding):
            return _layer(name, base, partial(_with_deltas, module, base, names), _lora_bias(module, names))
    raise ValueError(
        f"{name} is adapted by {type(module).__name__} on {type(module.get_base_layer()).__name__}: only LoRA on linear"
        " layers and embeddings can be merged weight by weight; merge it with qlora merge, then export that folder"
    )


def _with_deltas(module: Any, base: Any, names: list[str]) -> Tensor:
    return sum((module.get_delta_weight(a).float() for a in names), start=base.weight.detach().float())


def _lora_bias(module: Any, names: list[str]) -> Tensor | None:
    """What the biases of the adapters add to the layer's bias."""
    biases = [module.lora_B[a].bias * module.scaling[a] for a in names if module.lora_bias.get(a)]
    return sum(biases) if biases else None


def _layer(
    name: str, layer: Any, read: Callable[[], Tensor], more_bias: Tensor | None = None
) -> Iterator[tuple[str, DenseWeight]]:
    shape = layer.matrix_shape() if isinstance(layer, Linear4bit | Embedding4bit) else layer.weight.shape
    yield f"{name}.weight", DenseWeight(tuple(shape), lambda: read().detach().cpu())
    bias = getattr(layer, "bias", None)
    if bias is not None:
        yield f"{name}.bias", _stored(bias if more_bias is None else bias + more_bias)


def _stored(tensor: Tensor) -> DenseWeight:
    return DenseWeight(tuple(tensor.shape), lambda: tensor.detach().cpu())


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
