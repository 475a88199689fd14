"""``forward`` and ``backward``: dequantize · matmul + low-rank add, one operation each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.ops.common import (
    any_requires_grad,
    call_below_autograd,
    cast_activation,
    check_one_device,
    eager_shortcut,
    gradients,
    needs_gradient,
    not_requested,
    refuse_double_backward,
    register_autocast,
    require_frozen,
    require_number,
    save_tokens,
    saved_tokens,
)

_FORWARD = torch.ops.qlora.forward.default
_BACKWARD = torch.ops.qlora.backward.default


class Arguments(NamedTuple):
    """The arguments of ``torch.ops.qlora.forward``, in its order."""

    x: Any
    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    shape: Any
    quant_type: Any
    block_size: Any
    lora_a: Any = None
    lora_b: Any = None
    scaling: Any = 1.0
    bias: Any = None
    lora_x: Any = None


def forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    lora_x: Tensor | None = None,
) -> Tensor:
    """``y = x Wᵀ + bias + scaling * (lora_x or x) lora_aᵀ lora_bᵀ`` in one float32 accumulator, W unpacked on the fly.

    x ``[..., k]`` is float32, bfloat16 or float16; shape is ``(n, k)``; lora_a ``[r, k]`` and lora_b ``[n, r]`` share a
    float dtype, which may differ from x's; bias ``[n]``; lora_x is the input after dropout, of the shape and dtype of
    x. Returns ``[..., n]`` in the dtype of x. Differentiable once, in x, lora_a, lora_b, bias and lora_x. x and lora_x
    are kept for the backward only where a gradient of lora_a or lora_b reads them.
    """
    require_number("scaling", scaling)
    return _forward(
        x,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        list(shape),
        quant_type,
        block_size,
        lora_a,
        lora_b,
        scaling,
        bias,
        lora_x,
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    given = Arguments(*inputs)
    require_frozen(given.absmax, given.nested_absmax, given.nested_offset)
    drops, adapts = given.lora_x is not None, any_requires_grad(given.lora_a, given.lora_b)
    x = save_tokens(ctx, given.x, reads_values=adapts and not drops)
    lora_x = save_tokens(ctx, given.lora_x, reads_values=adapts) if drops else None
    ctx.save_for_backward(x, *given[1:5], given.lora_a, given.lora_b, lora_x)
    ctx.drops = drops
    ctx.weight = (list(given.shape), given.quant_type, given.block_size)
    ctx.scaling = given.scaling
    ctx.bias_dtype = None if given.bias is None else given.bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight, lora_a, lora_b, lora_x = ctx.saved_tensors
    needs = needs_gradient(Arguments, ctx)
    d_x, d_a, d_b, d_lora_x, d_bias = call_below_autograd(
        _BACKWARD,
        grad,
        saved_tokens(ctx, x, grad),
        *weight,
        *ctx.weight,
        lora_a,
        lora_b,
        ctx.scaling,
        saved_tokens(ctx, lora_x, grad) if ctx.drops else None,
        needs.x,
        needs.lora_a or needs.lora_b,
        needs.lora_x,
        needs.bias,
    )
    return gradients(
        Arguments,
        x=d_x if needs.x else None,
        lora_a=d_a if needs.lora_a else None,
        lora_b=d_b if needs.lora_b else None,
        bias=d_bias.to(ctx.bias_dtype) if needs.bias else None,
        lora_x=d_lora_x if needs.lora_x else None,
    )


_forward = eager_shortcut(_FORWARD, _setup_context, _differentiate)
torch.library.register_autograd("qlora::forward", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("qlora::backward", refuse_double_backward)


@torch.library.register_fake("qlora::forward.multi")
@torch.library.register_fake("qlora::forward")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    quant_type: str,
    block_size: int,
    *adapter_and_bias: Any,
    **more: Any,
) -> Tensor:
    torch._check(x.shape[-1] == shape[1], lambda: f"x has {x.shape[-1]} features: in_features={shape[1]}")
    check_one_device(x, packed, absmax, nested_absmax, nested_offset, *adapter_and_bias, *more.values())
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("qlora::backward")
def _(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    quant_type: str,
    block_size: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: Any,
    lora_x: Tensor | None,
    needs_x: bool,
    needs_lora: bool,
    needs_lora_x: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape) if needs_x else not_requested(x),
        lora_a.new_empty(lora_a.shape) if needs_lora and lora_a is not None else not_requested(x),
        lora_b.new_empty(lora_b.shape) if needs_lora and lora_b is not None else not_requested(x),
        x.new_empty(x.shape) if needs_lora_x and lora_x is not None else not_requested(x),
        x.new_empty(shape[0], dtype=torch.float32) if needs_bias else not_requested(x),
    )


def _cast(dtype: torch.dtype, *args: Any, **kwargs: Any) -> tuple[tuple, dict[str, Any]]:
    inputs = Arguments(*args, **kwargs)
    return inputs._replace(x=cast_activation(inputs.x, dtype), lora_x=cast_activation(inputs.lora_x, dtype)), {}


register_autocast("forward", _FORWARD, _cast)
