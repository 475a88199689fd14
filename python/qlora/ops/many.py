"""``forward.many`` and its backward: several layers with the same input, in one call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.ops.common import (
    any_requires_grad,
    call_below_autograd,
    cast_first_argument,
    check_one_device,
    gradients,
    needs_dispatcher,
    needs_gradient,
    not_requested,
    refuse_double_backward,
    refuse_forward_mode,
    register_autocast,
    require_frozen,
    require_number,
    save_tokens,
    saved_tokens,
)

_FORWARD = torch.ops.qlora.forward.many


class Arguments(NamedTuple):
    """The arguments of ``torch.ops.qlora.forward.many``, in its order; lists have one entry for each layer."""

    x: Any
    packed: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    out_features: Any
    quant_type: Any
    block_size: Any
    lora_a: Any
    lora_b: Any
    scaling: Any
    bias: Any

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of all lists, one list after another."""
        weights = self.packed + self.absmax + self.nested_absmax + self.nested_offset
        return weights + self.lora_a + self.lora_b + self.bias


def forward_many(
    x: Tensor,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor | None],
    nested_offset: Sequence[Tensor | None],
    out_features: Sequence[int],
    quant_type: str,
    block_size: int,
    lora_a: Sequence[Tensor | None] | None = None,
    lora_b: Sequence[Tensor | None] | None = None,
    scaling: Sequence[float] | None = None,
    bias: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """:func:`qlora.ops.forward` of several layers with the same x: one result ``[..., out_features[i]]`` for each.

    Every list has one entry for each layer; None says that a layer has no adapter, no bias or no nested statistics.
    Ranks may differ; quant type, block size and in_features are common. On a CPU x is packed once for all layers, and
    each step is one parallel loop; a result has the bits of a separate call. In the backward, the gradient of x is one
    sum over all layers, in one float32 accumulator. On a GPU the layers run one after another.

    Differentiable once, in x, lora_a, lora_b and bias.
    """
    for number in scaling or ():
        require_number("scaling", number)
    count = len(packed)
    none = x.new_empty(0)

    def given(tensors: Sequence[Tensor | None] | None) -> list[Tensor]:
        return [none] * count if tensors is None else [none if t is None else t for t in tensors]

    return call_operator(
        x,
        list(packed),
        list(absmax),
        given(nested_absmax),
        given(nested_offset),
        list(out_features),
        quant_type,
        block_size,
        given(lora_a),
        given(lora_b),
        [1.0] * count if scaling is None else list(scaling),
        given(bias),
    )


def call_operator(x: Tensor, *lists: Any) -> list[Tensor]:
    """Calls the operator with its own arguments: lists, with an empty tensor of one dimension for none."""
    arguments = Arguments(x, *lists)
    if not arguments.packed:
        return []
    tensors = arguments.tensors
    refuse_forward_mode(x, *tensors)
    if needs_dispatcher(x):
        return _FORWARD(*arguments)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *tensors):
        form = arguments.out_features, arguments.quant_type, arguments.block_size, arguments.scaling
        return list(_Function.apply(form, x, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD(*arguments)


def _split(tensors: Sequence[Any], count: int) -> list[list[Any]]:
    """A flat sequence as lists of ``count``."""
    return [list(tensors[i : i + count]) for i in range(0, len(tensors), count)]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    given = Arguments(*inputs)
    require_frozen(*given.absmax, *given.nested_absmax, *given.nested_offset)
    x = save_tokens(ctx, given.x, reads_values=any_requires_grad(*given.lora_a, *given.lora_b))
    ctx.save_for_backward(x, *given.tensors[: -len(given.bias)])
    ctx.form = given.out_features, given.quant_type, given.block_size
    ctx.scaling = given.scaling
    ctx.bias_dtypes = [t.dtype for t in given.bias]
    ctx.set_materialize_grads(False)  # None stands for a result that nobody used


def _gradients(
    ctx: Any, grads: Sequence[Tensor | None], needs: Arguments
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """The gradients of x, and of each layer's lora_a, lora_b and bias."""
    x, *tensors = ctx.saved_tensors
    *weights, lora_a, lora_b = _split(tensors, len(grads))
    given = next((grad for grad in grads if grad is not None), None)
    if given is None:
        nothing: list[Tensor | None] = [None] * len(grads)
        return None, nothing, nothing, nothing
    none = given.new_empty(0)
    d_x, *by_layer = call_below_autograd(
        torch.ops.qlora.backward.many,
        [none if grad is None else grad for grad in grads],
        saved_tokens(ctx, x, given),
        *weights,
        *ctx.form,
        lora_a,
        lora_b,
        ctx.scaling,
        needs.x,
        any(needs.lora_a) or any(needs.lora_b),
        any(needs.bias),
    )

    def requested(gradients: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
        every = zip(gradients, wanted, grads, strict=True)
        return [d if is_wanted and grad is not None else None for d, is_wanted, grad in every]

    d_a, d_b, d_bias = map(requested, by_layer, (needs.lora_a, needs.lora_b, needs.bias))
    d_bias = [None if d is None else d.to(dtype) for d, dtype in zip(d_bias, ctx.bias_dtypes, strict=True)]
    return d_x if needs.x else None, d_a, d_b, d_bias


class _Function(torch.autograd.Function):
    """Takes x and the tensors of all lists one after another, because autograd does not look into lists."""

    @staticmethod
    def forward(ctx: Any, form: tuple, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        out_features, quant_type, block_size, scaling = form
        *weights, lora_a, lora_b, bias = _split(tensors, len(out_features))
        inputs = (x, *weights, out_features, quant_type, block_size, lora_a, lora_b, scaling, bias)
        with torch._C._AutoDispatchBelowAutograd():
            output = _FORWARD(*inputs)
        _setup_context(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grads)
        _, needs_x, *needs = ctx.needs_input_grad
        lora_a, lora_b, bias = _split(needs, count)[4:]
        nothing = (False,) * 4
        wanted = Arguments(needs_x, *nothing, *nothing[:3], lora_a, lora_b, False, bias)
        d_x, d_a, d_b, d_bias = _gradients(ctx, grads, wanted)
        return None, d_x, *(None,) * (4 * count), *d_a, *d_b, *d_bias


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    d_x, d_a, d_b, d_bias = _gradients(ctx, grads, needs_gradient(Arguments, ctx))
    frozen = [None] * len(grads)
    weights = dict.fromkeys(("packed", "absmax", "nested_absmax", "nested_offset"), frozen)
    return gradients(Arguments, x=d_x, lora_a=d_a, lora_b=d_b, bias=d_bias, **weights)


torch.library.register_autograd("qlora::forward.many", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("qlora::backward.many", refuse_double_backward)


@torch.library.register_fake("qlora::forward.many")
def _(x: Tensor, *lists: Any) -> list[Tensor]:
    given = Arguments(x, *lists)
    k = x.shape[-1]
    for packed, n in zip(given.packed, given.out_features, strict=True):
        torch._check(
            packed.numel() == (n * k + 1) // 2, lambda: f"x has {k} features: a weight has another in_features"
        )
    check_one_device(x, *given.tensors)
    return [x.new_empty((*x.shape[:-1], n)) for n in given.out_features]


@torch.library.register_fake("qlora::backward.many")
def _(
    grad: list[Tensor],
    x: Tensor,
    packed: list[Tensor],
    absmax: list[Tensor],
    nested_absmax: list[Tensor],
    nested_offset: list[Tensor],
    out_features: list[int],
    quant_type: str,
    block_size: int,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scaling: list[float],
    needs_x: bool,
    needs_lora: bool,
    needs_bias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    used = [not (t.dim() == 1 and t.shape[0] == 0) for t in grad]

    def factors(given: list[Tensor]) -> list[Tensor]:
        return [
            t.new_empty(t.shape) if needs_lora and is_used and t.dim() == 2 else not_requested(x)
            for t, is_used in zip(given, used, strict=True)
        ]

    return (
        x.new_empty(x.shape) if needs_x else not_requested(x),
        factors(lora_a),
        factors(lora_b),
        [
            x.new_empty(n, dtype=torch.float32) if needs_bias and is_used else not_requested(x)
            for n, is_used in zip(out_features, used, strict=True)
        ],
    )


register_autocast("forward.many", _FORWARD, cast_first_argument)
