"""Groups of layers with one input, such as q_proj, k_proj and v_proj: the first one that is called computes all.

A group belongs to the module that holds the layers. A hook opens it when that module is called, and another one closes
it; between them, the first member that is called multiplies its input with the weights of all members in one operation
(:func:`qlora.ops.forward_many`). The others return their part if they get the very same tensor. So a model's code, its
parameters and the hooks of its layers stay as they are.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.ops.many import call_operator

logger = logging.getLogger(__name__)

# Names of layers that get the same tensor, in the order in which they are computed.
_GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
_PLAIN = (Tensor, nn.Parameter)
# With so few tokens a group costs more in Python than one operation saves: 10 % of SmolLM2's forward at one token.
_FEW_TOKENS = 8
with torch.inference_mode(False):
    _NONE = torch.empty(0, device="cpu")


class Product(NamedTuple):
    """A layer's forward as one fused operation: its 4-bit weight and bias, and at most one adapter."""

    base: Any  # Linear4bit
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0


class _Call:
    """One call of the module that holds a group."""

    def __init__(self, group: "SharedInput", members: tuple[nn.Module, ...]) -> None:
        self.group, self.members = group, members
        self.results: dict[int, Tensor] = {}  # of members that have not been called yet, by id
        self._x: Tensor | None = None
        self._state: tuple[Any, ...] = ()

    def take(self, member: nn.Module, x: Tensor) -> Tensor | None:
        if not self.results and self.members:
            products = _products(self.members, x)
            if products is None:
                self.members = ()  # every member computes on its own in this call
                return None
            self._x, self._state = x, _state(x)
            self.results = dict(zip(map(id, self.members), _compute(products, x), strict=True))
        if x is not self._x or _state(x) != self._state:
            return None
        result = self.results.pop(id(member), None)
        if not self.results:
            self._x = None
        return result


class _Open(threading.local):
    """The calls that are running in this thread, the innermost last."""

    calls: tuple[_Call, ...] = ()


_OPEN = _Open()


class SharedInput:
    """The hooks of one group on the module that holds its layers; ``names`` are the layers' names in it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.is_enabled = True
        # A checkpointed module runs again in the backward and must then do the same as in its forward.
        self._was_enabled = True

    def open(self, module: nn.Module, args: Any) -> None:
        """The pre-hook of the module."""
        if torch.compiler.is_compiling():
            return  # a compiled graph multiplies layer by layer
        if torch._C._current_graph_task_id() == -1:  # not in a backward
            self._was_enabled = self.is_enabled
        if self._was_enabled:
            members = tuple(filter(None, map(module._modules.get, self.names)))
            # Hooks do not run after a KeyboardInterrupt, so a call of this group that is still open was interrupted.
            open_calls = (call for call in _OPEN.calls if call.group is not self)
            _OPEN.calls = (*open_calls, _Call(self, members))

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook of the module, which also runs after an exception, then without an output."""
        if torch.compiler.is_compiling():
            return
        for index in range(len(_OPEN.calls) - 1, -1, -1):
            call = _OPEN.calls[index]
            if call.group is self:
                _OPEN.calls = _OPEN.calls[:index]
                if call.results and output is not None and not _will_run_again():
                    self.is_enabled = False
                    name = type(module).__name__
                    logger.info("%s: %s have different inputs and are computed one by one", name, self.names)
                return


def shared_result(member: nn.Module, x: Tensor) -> Tensor | None:
    """``member``'s result for ``x`` from its group, or None if ``member`` has to compute it."""
    if torch.compiler.is_compiling():
        return None
    for call in reversed(_OPEN.calls):
        if any(member is other for other in call.members):
            return call.take(member, x)
    return None


def _will_run_again() -> bool:
    """Whether checkpointing runs: it calls modules again in the backward, which must do the same as in the forward."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the calls of two members."""
    return x._version, torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()


def _can_share(member: nn.Module | None) -> bool:
    """Whether a layer's class asks its group for its result."""
    return hasattr(type(member), "fused_product")


def _products(members: tuple[nn.Module, ...], x: Tensor) -> list[Product] | None:
    """The products of all members, or None if they cannot be computed together for ``x``."""
    if len(members) < 2 or not x.is_cpu or type(x) not in _PLAIN or x.dim() == 0:
        return None
    if x.numel() <= _FEW_TOKENS * x.shape[-1]:
        return None
    if x.is_inference():  # such a tensor does not count its changes
        return None
    products: list[Product] = []
    form = None
    for member in members:
        own = vars(member)
        if not _can_share(member) or "forward" in own:
            return None
        # A hook that runs before a member may change its input, or its weight while the group is open.
        if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        product: Product | None = member.fused_product()  # type: ignore[operator]
        if product is None:
            return None
        base = product.base
        if form is None:
            form = (x.shape[-1], base.quant_type, base.block_size, base.compute_dtype)
        if form != (base.in_features, base.quant_type, base.block_size, base.compute_dtype):
            return None
        if "weight" not in base._parameters:  # a replica of DataParallel
            return None
        products.append(product)
    return products


def _compute(products: list[Product], x: Tensor) -> list[Tensor]:
    bases = [product.base for product in products]
    parameters = [base._parameters for base in bases]
    buffers = [base._buffers for base in bases]
    compute = bases[0].compute_dtype or x.dtype
    results = call_operator(
        x if compute == x.dtype else x.to(compute),
        [own["weight"] for own in parameters],
        [own["absmax"] for own in buffers],
        [own["nested_absmax"] for own in buffers],
        [own["nested_offset"] for own in buffers],
        [base.out_features for base in bases],
        bases[0].quant_type,
        bases[0].block_size,
        [_NONE if product.lora_a is None else product.lora_a for product in products],
        [_NONE if product.lora_b is None else product.lora_b for product in products],
        [product.scaling for product in products],
        [_NONE if own["bias"] is None else own["bias"] for own in parameters],
    )
    return results if compute == x.dtype else [result.to(x.dtype) for result in results]


def _groups(module: nn.Module) -> Iterator[SharedInput]:
    for hook in module._forward_pre_hooks.values():
        group = getattr(hook, "__self__", None)
        if isinstance(group, SharedInput):
            yield group


def share_inputs(model: nn.Module, enabled: bool = True) -> int:
    """Computes the 4-bit layers of ``model`` that share an input together, on a CPU; ``enabled=False`` ends that.

    Groups are found by the usual names: q_proj, k_proj and v_proj of one module, gate_proj and up_proj, and the like.
    Results have the same bits. The gradient of the shared input is one sum over the layers in float32, where autograd
    would round it after each layer. Without a call of this function, no layers are computed together: on two cores it
    saves a fifth of the time of small projections, but nothing of a whole model's
    (docs/notes/cpu-kernels.md, "Layers that share an input").

    Layers compute one by one in a call in which one of them is merged, has several active adapters, dropout, DoRA, an
    adapter for each sample, or a hook that runs before it; with up to 8 tokens, as in generation; on a GPU; and inside
    torch.compile or torch.inference_mode. A group whose layers turn out to have different inputs, as in cross
    attention, is disabled, though not while gradient checkpointing runs.

    Returns the number of groups that are now enabled, or were disabled.
    """
    count = 0
    for module in model.modules():
        known = {group.names: group for group in _groups(module)}
        for names in _GROUPS:
            members = [module._modules.get(name) for name in names]
            if names not in known and enabled and all(map(_can_share, members)):
                known[names] = group = SharedInput(names)
                module.register_forward_pre_hook(group.open)
                module.register_forward_hook(group.close, always_call=True)
        for group in known.values():
            group.is_enabled = enabled
            count += 1
    return count
