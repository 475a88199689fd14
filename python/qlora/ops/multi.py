"""``forward.multi`` and its backward: an adapter for each row of x."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.ops.common import (
    any_requires_grad,
    call_below_autograd,
    cast_first_argument,
    eager_shortcut,
    gradients,
    needs_gradient,
    not_requested,
    refuse_double_backward,
    register_autocast,
    require_frozen,
    save_tokens,
    saved_tokens,
)


class Arguments(NamedTuple):
    """The arguments of ``torch.ops.qlora.forward.multi``, in its order."""

    x: Any
    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    shape: Any
    quant_type: Any
    block_size: Any
    lora_a: Any
    lora_b: Any
    scaling: Any
    adapter_of_row: Any
    bias: Any = None


def forward_multi(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    adapter_of_row: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`qlora.ops.forward` with a separate adapter for each row of x; the weight is unpacked once for all rows.

    lora_a ``[adapters, r, k]`` and lora_b ``[adapters, n, r]``; scaling float32 ``[adapters]``; adapter_of_row int64
    ``[rows]``, rows being the product of x's leading dimensions, with -1 for the base alone. Differentiable once, in x,
    lora_a, lora_b and bias.
    """
    weight = (packed, absmax, nested_absmax, nested_offset, list(shape), quant_type, block_size)
    return _forward(x, *weight, lora_a, lora_b, scaling, adapter_of_row, bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    given = Arguments(*inputs)
    require_frozen(given.absmax, given.nested_absmax, given.nested_offset)
    if given.scaling.requires_grad:
        raise RuntimeError("scaling requires grad: forward.multi has no gradient for it, so detach it")
    x = save_tokens(ctx, given.x, reads_values=any_requires_grad(given.lora_a, given.lora_b))
    ctx.save_for_backward(x, *given[1:5], given.lora_a, given.lora_b, given.scaling, given.adapter_of_row)
    ctx.weight = (list(given.shape), given.quant_type, given.block_size)
    ctx.bias_dtype = None if given.bias is None else given.bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    weight, adapters = saved[:4], saved[4:]
    needs = needs_gradient(Arguments, ctx)
    d_x, d_a, d_b, d_bias = call_below_autograd(
        torch.ops.qlora.backward.multi,
        grad,
        saved_tokens(ctx, x, grad),
        *weight,
        *ctx.weight,
        *adapters,
        needs.x,
        needs.lora_a or needs.lora_b,
        needs.bias,
    )
    return gradients(
        Arguments,
        x=d_x if needs.x else None,
        lora_a=d_a if needs.lora_a else None,
        lora_b=d_b if needs.lora_b else None,
        bias=d_bias.to(ctx.bias_dtype) if needs.bias else None,
    )


_forward = eager_shortcut(torch.ops.qlora.forward.multi, _setup_context, _differentiate)
torch.library.register_autograd("qlora::forward.multi", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("qlora::backward.multi", refuse_double_backward)


@torch.library.register_fake("qlora::backward.multi")
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
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Any,
    adapter_of_row: Tensor,
    needs_x: bool,
    needs_lora: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape) if needs_x else not_requested(x),
        lora_a.new_empty(lora_a.shape) if needs_lora else not_requested(x),
        lora_b.new_empty(lora_b.shape) if needs_lora else not_requested(x),
        x.new_empty(shape[0], dtype=torch.float32) if needs_bias else not_requested(x),
    )


register_autocast("forward.multi", torch.ops.qlora.forward.multi, cast_first_argument)
