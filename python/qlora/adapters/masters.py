"""Keeps trainable 16-bit parameters in float32 while their layers still compute in 16 bit."""

import functools
from typing import Any

import torch
from torch import nn

from qlora.nn.packed import PackedMatrix


def train_in_float32(model: nn.Module) -> None:
    """Converts trainable 16-bit parameters to float32, in place.

    A bf16 weight loses updates below 1/256 of its value, and gradient scalers refuse fp16 gradients. PEFT converts its
    own adapters but not ``modules_to_save``.
    """
    found = []
    for module in model.modules():
        dtypes = {
            name: parameter.dtype
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and parameter.dtype.itemsize == 2
        }
        if dtypes:
            found.append((module, dtypes))
    for module, dtypes in found:  # finds all before it changes one, since modules may share a parameter
        for name in dtypes:
            parameter = getattr(module, name)
            parameter.data = parameter.data.float()
        if not isinstance(module, PackedMatrix):  # its operator accepts a bias of any dtype
            module.register_forward_pre_hook(functools.partial(_cast, dtypes))
            module.register_forward_hook(functools.partial(_restore, dtypes), always_call=True)


def back_to_16_bit(model: nn.Module) -> None:
    """Undoes :func:`train_in_float32`: rounds parameters to their original dtype."""
    for module in model.modules():
        hook: Any
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "func", None) is _cast:
                del module._forward_pre_hooks[key]
                for name, dtype in hook.args[0].items():
                    parameter = getattr(module, name)
                    parameter.data = parameter.data.to(dtype)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "func", None) is _restore:
                del module._forward_hooks[key]
                module._forward_hooks_always_called.pop(key, None)


# These hooks work on the module they are called with, so that a copied module uses its own parameters.


def _tensors(module: nn.Module, dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    """The dictionary that holds these parameters of a module; DataParallel's replicas have them as plain attributes."""
    return module._parameters if next(iter(dtypes)) in module._parameters else vars(module)


def _cast(dtypes: dict[str, torch.dtype], module: nn.Module, args: Any) -> None:
    tensors = _tensors(module, dtypes)
    vars(module)["_masters"] = {name: tensors[name] for name in dtypes}
    tensors.update({name: tensors[name].to(dtype) for name, dtype in dtypes.items()})


def _restore(dtypes: dict[str, torch.dtype], module: nn.Module, args: Any, output: Any) -> None:
    masters = vars(module).pop("_masters", None)
    if masters is not None:  # None: the pre-hook has not run
        _tensors(module, dtypes).update(masters)
