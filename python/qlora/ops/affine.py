"""``forward.affine`` and its backward: the textbook form, with a scale and a zero point."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.ops.common import (
    any_requires_grad,
    cast_first_argument,
    gradients,
    needs_gradient,
    not_requested,
    refuse_double_backward,
    refuse_forward_mode,
    register_autocast,
    require_number,
    save_tokens,
    saved_tokens,
)


class Arguments(NamedTuple):
    """The arguments of ``torch.ops.qlora.forward.affine`` and ``.affine_grid``, in their order."""

    x: Any
    quantized_W: Any
    scale: Any
    zero_point: Any
    B: Any
    A: Any
    alpha: Any


def forward_affine(
    x: Tensor,
    quantized_W: Tensor,
    scale: float | Tensor,
    zero_point: float | Tensor,
    B: Tensor,
    A: Tensor,
    alpha: float,
) -> Tensor:
    """The textbook form ``y = x (q * scale + zero_point) + alpha / r * x B A``.

    x ``[..., in]``; quantized_W ``[in, out]`` of any integer dtype; B ``[in, r]``; A ``[r, out]``. scale and zero_point
    are numbers, or float32 tensors of one shape: ``[]``, ``[out]`` (per output channel), or ``[groups, out]`` or
    ``[groups, 1]`` (per group of in / groups input rows). zero_point is added after scaling.
    """
    refuse_forward_mode(x, scale, zero_point, B, A)
    require_number("alpha", alpha)
    if isinstance(scale, Tensor) != isinstance(zero_point, Tensor):
        raise TypeError("scale and zero_point must both be numbers or both be tensors")
    op = torch.ops.qlora.forward.affine_grid if isinstance(scale, Tensor) else torch.ops.qlora.forward.affine
    return op(x, quantized_W, scale, zero_point, B, A, alpha)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    given = Arguments(*inputs)
    ctx.alpha = given.alpha
    x = save_tokens(ctx, given.x, reads_values=any_requires_grad(given.B, given.A))
    if isinstance(given.scale, Tensor):
        if given.scale.requires_grad or given.zero_point.requires_grad:
            raise RuntimeError(
                "scale and zero_point require grad: forward.affine has no gradient for them; detach them"
            )
        ctx.save_for_backward(x, given.quantized_W, given.B, given.A, given.scale, given.zero_point)
    else:
        ctx.save_for_backward(x, given.quantized_W, given.B, given.A)
        ctx.scalars = (given.scale, given.zero_point)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, quantized_W, B, A, *grid = ctx.saved_tensors
    x = saved_tokens(ctx, x, grad)
    if not grid:
        grid = [grad.new_full((1,), value, dtype=torch.float32) for value in ctx.scalars]
    needs = needs_gradient(Arguments, ctx)
    d_x, d_B, d_A = torch.ops.qlora.backward.affine_grid(
        grad, x, quantized_W, *grid, B, A, ctx.alpha, needs.x, needs.B or needs.A
    )
    return gradients(Arguments, x=d_x if needs.x else None, B=d_B if needs.B else None, A=d_A if needs.A else None)


for _name in ("affine", "affine_grid"):
    torch.library.register_autograd(f"qlora::forward.{_name}", _differentiate, setup_context=_setup_context)
    register_autocast(f"forward.{_name}", getattr(torch.ops.qlora.forward, _name), cast_first_argument)
torch.library.register_autograd("qlora::backward.affine_grid", refuse_double_backward)


@torch.library.register_fake("qlora::forward.affine")
@torch.library.register_fake("qlora::forward.affine_grid")
def _(x: Tensor, quantized_W: Tensor, scale: Any, zero_point: Any, B: Tensor, A: Tensor, alpha: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], quantized_W.shape[1]))


@torch.library.register_fake("qlora::backward.affine_grid")
def _(
    grad: Tensor,
    x: Tensor,
    quantized_W: Tensor,
    scale: Any,
    zero_point: Any,
    B: Tensor,
    A: Tensor,
    alpha: float,
    needs_x: bool,
    needs_lora: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape) if needs_x else not_requested(x),
        B.new_empty(B.shape) if needs_lora else not_requested(x),
        A.new_empty(A.shape) if needs_lora else not_requested(x),
    )
