"""Helpers of several operators: names of formats and dtypes, gradients by name, what autograd refuses, autocast.

Importing this module loads the operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qlora import _C, _load  # noqa: F401  (_load loads the operators)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANT_TYPES: tuple[str, ...] = _C.QUANT_TYPES


def check_format(quant_type: str, block_size: int) -> None:
    """Raises ValueError for an unknown quant type or a block size that the format does not allow."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type='{quant_type}' is unknown: use one of {', '.join(QUANT_TYPES)}")
    if not _C.MIN_BLOCK_SIZE <= block_size <= _C.MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(
            f"block_size={block_size} must be a power of two from {_C.MIN_BLOCK_SIZE} to {_C.MAX_BLOCK_SIZE}"
        )


def needs_gradient(arguments: type, ctx: Any) -> Any:
    """``ctx.needs_input_grad`` by the names of an operator's arguments (a NamedTuple class).

    The dispatcher omits trailing arguments that have their defaults: nothing needs their gradients.
    """
    given = ctx.needs_input_grad
    return arguments(*given, *(False,) * (len(arguments._fields) - len(given)))  # type: ignore[attr-defined]


def gradients(arguments: type, **by_name: Any) -> tuple[Any, ...]:
    """A gradient (of a list: a list) for each of an operator's arguments, None for those that are not named."""
    return tuple(by_name.get(name) for name in arguments._fields)  # type: ignore[attr-defined]


def not_requested(like: Tensor) -> Tensor:
    """What a backward operator returns in the place of a gradient that nobody needs: an empty float32 tensor."""
    return like.new_empty(0, dtype=torch.float32)


def check_one_device(x: Tensor, *others: Any) -> None:
    """For fake kernels: raises RuntimeError if a given tensor is on another device than x."""
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            raise RuntimeError(
                f"x is on {x.device}, and a {other.dtype} tensor of shape {tuple(other.shape)} on {other.device}: all"
                " tensors must be on one device"
            )


def new_scales(weight: Tensor, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (absmax, nested_absmax, nested_offset) for a weight, as operators return them."""
    blocks = (weight.numel() + block_size - 1) // block_size
    nested = (blocks + _C.NESTED_BLOCK - 1) // _C.NESTED_BLOCK if double_quant else 0
    return (
        weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        weight.new_empty(nested, dtype=torch.float32),
        weight.new_empty(1 if double_quant else 0, dtype=torch.float32),
    )


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of the given tensors requires a gradient."""
    return any(t is not None and t.requires_grad for t in tensors)


def save_tokens(ctx: Any, x: Tensor, reads_values: bool) -> Tensor | None:
    """What the backward needs of its tokens: x if it reads the values, else None, with the shape in ``ctx``.

    Only gradients of low-rank factors read the values. Without this, every 4-bit layer that has no trainable adapter
    would keep its input alive until the backward, which a frozen ``torch.nn.Linear`` does not.
    """
    ctx.tokens_shape = x.shape
    return x if reads_values else None


def saved_tokens(ctx: Any, saved: Tensor | None, grad: Tensor) -> Tensor:
    """What :func:`save_tokens` saved, or a tensor of its shape, dtype and device that has the memory of one number."""
    return grad.new_empty(1).expand(ctx.tokens_shape) if saved is None else saved


def require_number(name: str, value: float | Tensor) -> None:
    """Raises RuntimeError if a number is a tensor that requires grad: an operator would lose its gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise RuntimeError(f"{name} requires grad: it is a number, for which there is no gradient, so detach it")


def refuse_quantization_gradient(ctx: Any, *grads: Tensor) -> None:
    """The derivative of operators that make or read whole 4-bit weights: raises RuntimeError."""
    raise RuntimeError("quantize and dequantize are not differentiable: a 4-bit weight is frozen")


def require_frozen(*statistics: Tensor | None) -> None:
    """Raises RuntimeError if one of a weight's statistics requires a gradient."""
    if any_requires_grad(*statistics):
        raise RuntimeError("absmax or its nested statistics require grad: a 4-bit weight is frozen, so detach them")


def refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    """The derivative of every backward operator: raises RuntimeError."""
    raise RuntimeError("qlora's backward is not differentiable: double backward (create_graph=True) is not supported")


def refuse_forward_mode(*inputs: Any) -> None:
    """Raises NotImplementedError if an input carries a tangent, which torch would silently drop."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError("qlora has no forward-mode derivatives (jvp, forward AD): use reverse mode")


# A shortcut for eager calls. The registrations of an operator run Python for each dispatcher key, which costs 13 µs a
# call without gradients and 60 µs with them. Compilers, autocast, functorch and subclasses of Tensor still need the
# dispatcher. docs/notes/cpu-kernels.md has the figures.

_PLAIN = (Tensor, torch.nn.Parameter)


def needs_dispatcher(x: Tensor) -> bool:
    """Whether something handles a call of an operator with activation ``x`` above its kernel."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or not (x.is_cpu or x.is_cuda)
    )


def eager_shortcut(
    op: Any, setup_context: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that calls ``op`` below the dispatcher's autograd key where nothing needs the dispatcher.

    ``setup_context`` and ``differentiate`` are what ``torch.library.register_autograd`` gets for the operator, whose
    first argument is the activation.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

    def call(*inputs: Any) -> Tensor:
        refuse_forward_mode(*inputs)
        x = inputs[0]
        if needs_dispatcher(x):
            return op(*inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


def call_below_autograd(op: Any, grad: Tensor | list[Tensor], *inputs: Any) -> Any:
    """Calls a backward operator below the dispatcher's autograd key where nothing needs that key.

    Read ``ctx.saved_tensors`` before this call: under a checkpoint, reading it runs the forward again, with autograd.
    """
    if (
        torch.is_grad_enabled()  # create_graph=True, which the registered autograd function refuses
        or torch.compiler.is_compiling()
        or any(type(t) is not Tensor for t in (grad if isinstance(grad, list) else (grad,)))
        or torch._C._are_functorch_transforms_active()
    ):
        return op(grad, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(grad, *inputs)


# torch's ready-made rule casts every float tensor, even the float32 scales. This one casts only the activations:
# adapters and bias may have their own dtype.

_AUTOCAST_LIBRARY = torch.library.Library("qlora", "FRAGMENT")
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def cast_activation(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in autocast's dtype; None, and what has another kind of dtype, as it is."""
    return x.to(dtype) if x is not None and x.dtype in FLOAT_DTYPES else x


def cast_first_argument(dtype: torch.dtype, x: Tensor, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
    """The rule of an operator whose one activation is its first argument."""
    return (cast_activation(x, dtype), *args), kwargs


def register_autocast(name: str, op: Any, cast: Callable[..., tuple[tuple, dict[str, Any]]]) -> None:
    """Registers ``cast(dtype, *args, **kwargs) -> (args, kwargs)`` as what autocast does to a call of ``op``."""

    def rule(device: str) -> Callable[..., Any]:
        below_autocast = torch._C.DispatchKeySet(_AUTOCAST_KEYS[device])

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = cast(torch.get_autocast_dtype(device), *args, **kwargs)
            with torch._C._ExcludeDispatchKeyGuard(below_autocast):
                return op(*args, **kwargs)

        return run

    for device in _AUTOCAST_KEYS:
        _AUTOCAST_LIBRARY.impl(name, rule(device), f"Autocast{device.upper()}")
