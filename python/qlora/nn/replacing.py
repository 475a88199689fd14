"""Which layers may become 4-bit layers, and putting a layer in the place of another."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Subclasses whose forward is that of nn.Linear in other words.
_PLAIN_SUBCLASSES = ("FalconLinear",)


def has_hooks(*modules: Any) -> bool:
    """Whether calling one of the modules does more than its class's forward: hooks, or a forward of the instance, as
    accelerate's offloading sets it. Reading its parameters instead of calling it would leave that out."""
    for module in modules:
        own = vars(module)
        if "forward" in own or any(own[name] for name in _HOOKS):
            return True
    return False


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Within it, modules whose parameters accelerate keeps elsewhere have them; for modules that are not called.

    Raises RuntimeError if parameters that train would be loaded: their gradients would go to copies."""
    with ExitStack() as stack:
        for module in modules:
            hook = getattr(module, "_hf_hook", None)
            if hook is None:
                continue
            if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
                raise RuntimeError("adapters that accelerate keeps elsewhere (offloading) cannot be trained")
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a 4-bit layer cannot take the place of ``module``: it computes more than ``kind``, a class of torch's (or
    transformers' Conv1D), does with its parameters. None if it can."""
    name = type(module).__name__
    parametrized: Any = getattr(module, "parametrizations", None)
    if parametrized:
        return f"the parametrization of its {', '.join(parametrized)} makes another weight at each call"
    if type(module).forward is not kind.forward and name not in _PLAIN_SUBCLASSES:
        return f"{name} has a forward of its own"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention multiplies with its weight without calling it"
    if has_hooks(module):
        return "it has hooks, or a forward of the instance, that would be lost: remove them first"
    return None


def require_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ValueError naming the class and the reason unless a 4-bit layer can take the place of ``module``."""
    reason = why_not_plain(module, kind)
    if reason is not None:
        raise ValueError(f"{type(module).__name__} cannot be put into 4 bit: {reason}")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``model`` holds ``old``, under every name that it has."""
    for parent in list(model.modules()):  # a list: `new` may hold `old` itself
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # its fast path reads the children's weights itself


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    seen: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in seen.values())


_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")


def head_names(model: nn.Module) -> set[str]:
    """Names of the linear layers of a model's head: its output embeddings, and for a transformers model whatever is
    not part of its backbone, a classifier that a task has added, for example."""
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
    """Names of linear layers that share their weight with another module, an embedding, for example."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    return {name for name in shared if isinstance(model.get_submodule(name), nn.Linear)}
