"""``forward.experts`` and its backward: the products of a mixture's experts, each with the rows that chose it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.ops.common import (
    any_requires_grad,
    call_below_autograd,
    cast_first_argument,
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


class Arguments(NamedTuple):
    """The arguments of ``torch.ops.qlora.forward.experts``, in its order."""

    x: Any
    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    shape: Any
    quant_type: Any
    block_size: Any
    expert_of_row: Any
    lora_a: Any = None
    lora_b: Any = None
    scaling: Any = 1.0
    bias: Any = None


def forward_experts(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    expert_of_row: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of each row with the weight of its expert, ``[rows, n]``, in one call for all experts.

    x ``[..., k]``; shape ``(experts, n, k)``; packed, absmax and its nested statistics hold those of each expert one
    after another. expert_of_row int64, of any shape with ``tokens * choices`` numbers: row i of the result belongs to
    token i // choices of x. A row whose number is not one of 0 … experts - 1 is zero, which is how a process skips the
    experts of others. lora_a ``[experts, r, k]``, lora_b ``[experts, n, r]`` and bias ``[experts, n]`` are optional.

    A row is bit for bit what :func:`qlora.ops.forward` computes for the rows of its expert. No value is read by the
    host on a GPU. Differentiable once, in x, lora_a, lora_b and bias.
    """
    require_number("scaling", scaling)
    weight = (packed, absmax, nested_absmax, nested_offset, list(shape), quant_type, block_size)
    return _forward(x, *weight, expert_of_row, lora_a, lora_b, scaling, bias)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    given = Arguments(*inputs)
    require_frozen(given.absmax, given.nested_absmax, given.nested_offset)
    x = save_tokens(ctx, given.x, reads_values=any_requires_grad(given.lora_a, given.lora_b))
    ctx.save_for_backward(x, *given[1:5], given.expert_of_row, given.lora_a, given.lora_b)
    ctx.weight = (list(given.shape), given.quant_type, given.block_size)
    ctx.scaling = given.scaling
    ctx.bias_dtype = None if given.bias is None else given.bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *weight, expert_of_row, lora_a, lora_b = ctx.saved_tensors
    needs = needs_gradient(Arguments, ctx)
    d_x, d_a, d_b, d_bias = call_below_autograd(
        torch.ops.qlora.backward.experts,
        grad,
        saved_tokens(ctx, x, grad),
        *weight,
        *ctx.weight,
        expert_of_row,
        lora_a,
        lora_b,
        ctx.scaling,
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


_forward = eager_shortcut(torch.ops.qlora.forward.experts, _setup_context, _differentiate)
torch.library.register_autograd("qlora::forward.experts", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("qlora::backward.experts", refuse_double_backward)


@torch.library.register_fake("qlora::forward.experts")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    quant_type: str,
    block_size: int,
    expert_of_row: Tensor,
    *adapter_and_bias: Any,
    **more: Any,
) -> Tensor:
    torch._check(x.shape[-1] == shape[2], lambda: f"x has {x.shape[-1]} features: in_features={shape[2]}")
    check_one_device(x, packed, absmax, nested_absmax, nested_offset, expert_of_row, *adapter_and_bias, *more.values())
    return x.new_empty((expert_of_row.numel(), shape[1]))


@torch.library.register_fake("qlora::backward.experts")
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
    expert_of_row: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: Any,
    needs_x: bool,
    needs_lora: bool,
    needs_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape) if needs_x else not_requested(x),
        lora_a.new_empty(lora_a.shape) if needs_lora and lora_a is not None else not_requested(x),
        lora_b.new_empty(lora_b.shape) if needs_lora and lora_b is not None else not_requested(x),
        x.new_empty(shape[:2], dtype=torch.float32) if needs_bias else not_requested(x),
    )


register_autocast("forward.experts", torch.ops.qlora.forward.experts, cast_first_argument)
