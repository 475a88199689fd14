"""Decides which layers can become 4-bit layers, and replaces layers in a model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# Subclasses whose own forward computes the same as nn.Linear's.
_PLAIN_SUBCLASSES = ("FalconLinear",)


def has_hooks(*modules: Any) -> bool:
    """Whether calling one of the modules does more than its class's forward on its parameters.

    That is the case with hooks, or with a forward set on the instance, as accelerate's offloading does.
    """
    for module in modules:
        own = vars(module)
        if (  # without a loop over names: layers ask this in every call
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Loads parameters that accelerate has offloaded, inside a ``with`` block, for modules that are not called.

    Raises RuntimeError if a parameter to load is trainable, because its gradient would go to a copy.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = getattr(module, "_hf_hook", None)
            if hook is None:
                continue
            if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
                raise RuntimeError("adapters that accelerate has offloaded cannot be trained")
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a 4-bit layer cannot replace ``module``, namely what it computes beyond ``kind``; None if it can.

    ``kind`` is the plain class: one of torch's, or transformers' Conv1D.
    """
    name = type(module).__name__
    parametrized: Any = getattr(module, "parametrizations", None)
    if parametrized:
        return f"the parametrization of its {', '.join(parametrized)} computes a new weight at each call"
    if type(module).forward is not kind.forward and name not in _PLAIN_SUBCLASSES:
        return f"{name} has its own forward"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention multiplies with its weight without calling it"
    if has_hooks(module):
        return "it has hooks, or a forward set on the instance, that would be lost: remove them first"
    return None


def require_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ValueError with the class and the reason unless a 4-bit layer can replace ``module``."""
    reason = why_not_plain(module, kind)
    if reason is not None:
        raise ValueError(f"{type(module).__name__} cannot be put into 4 bit: {reason}")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces ``old`` by ``new`` in ``model``, under every name that ``old`` has."""
    for parent in list(model.modules()):  # a list: `new` may hold `old` itself
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # disables its fast path, which reads the children's weights


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    seen: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in seen.values())


_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


def head_names(model: nn.Module) -> set[str]:
    """Names of the linear layers in a model's heads.

    These are the output embeddings, and in a transformers model every linear layer outside its backbone, for example a
    task's classifier.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    has_backbone = isinstance(backbone, nn.Module) and backbone is not model
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (
            module is head
            or name.rpartition(".")[2] in _HEAD_NAMES
            or (has_backbone and not name.startswith(f"{prefix}."))
        )
    }


def shared_names(model: nn.Module) -> set[str]:
    """Names of linear layers that share their weight with another module, for example an embedding."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    return {name for name in shared if isinstance(model.get_submodule(name), nn.Linear)}
