"""The operators ``torch.ops.qlora.*`` as typed functions.

The schemas stand in ``csrc/ops/schema.cpp``. Every function here has a twin of the same signature in
:mod:`qlora.reference`, in plain torch.

Extents: m tokens, n out features, k in features, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora import _C, _registration
from qlora._registration import FLOAT_DTYPES as FLOAT_DTYPES  # importing it registers the operators

QUANT_TYPES: tuple[str, ...] = _C.QUANT_TYPES


def check_format(quant_type: str, block_size: int) -> None:
    """Raises ValueError unless the format knows the quant type and allows the block size."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type='{quant_type}' is unknown: use one of {', '.join(QUANT_TYPES)}")
    if not _C.MIN_BLOCK_SIZE <= block_size <= _C.MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(
            f"block_size={block_size} must be a power of two from {_C.MIN_BLOCK_SIZE} to {_C.MAX_BLOCK_SIZE}"
        )


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes a float32, bfloat16 or float16 weight of any shape to 4 bit, blockwise along the flat order.

    Returns ``(packed, absmax, nested_absmax, nested_offset)``: packed is uint8 ``[ceil(numel / 2)]``; absmax is float32
    ``[blocks]``, or uint8 with double quantization; the nested tensors are float32, ``[ceil(blocks / 256)]`` and
    ``[1]``, empty without it.

    Raises RuntimeError for an unknown quant_type, a block size that is no power of two in 32 … 4096, and, with
    check_finite, for nan or inf (naming the position).
    Source: Dettmers et al. 2023, "QLoRA"; docs/format.md.
    """
    return torch.ops.qlora.quantize(weight, quant_type, block_size, double_quant, check_finite)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight as a dense tensor of ``shape`` and ``dtype``: float32 level times float32 scale, rounded once."""
    return torch.ops.qlora.dequantize(
        packed, absmax, nested_absmax, nested_offset, list(shape), quant_type, block_size, dtype
    )


def quantization_error(
    weight: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Tensor:
    """How far a 4-bit weight is from ``weight``: float64 ``[3]``, the sum of squared differences, the sum of squares of
    ``weight``, and the largest absolute difference. Allocates nothing of the weight's size."""
    return torch.ops.qlora.quantization_error(
        weight, packed, absmax, nested_absmax, nested_offset, quant_type, block_size
    )


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
    """``y = x Wᵀ + bias + scaling * (lora_x or x) lora_aᵀ lora_bᵀ`` in one float32 accumulator, W decoded on the way.

    x ``[..., k]`` float32, bfloat16 or float16; shape ``(n, k)``; lora_a ``[r, k]`` and lora_b ``[n, r]`` of one float
    dtype that may differ from x's; bias ``[n]``; lora_x is the input after dropout, of the shape and dtype of x.
    Returns ``[..., n]`` in the dtype of x. Differentiable in x, lora_a, lora_b, bias and lora_x, once.
    """
    return _registration.forward(
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
    _registration.refuse_forward_mode(x, scale, zero_point, B, A)
    if isinstance(scale, Tensor) != isinstance(zero_point, Tensor):
        raise TypeError("scale and zero_point must both be numbers or both be tensors")
    if isinstance(scale, Tensor):
        return torch.ops.qlora.forward.affine_grid(x, quantized_W, scale, zero_point, B, A, alpha)
    return torch.ops.qlora.forward.affine(x, quantized_W, scale, zero_point, B, A, alpha)


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
    """:func:`forward` with an adapter of its own for each row of x; the weight is decoded once for all of them.

    lora_a ``[adapters, r, k]`` and lora_b ``[adapters, n, r]``; scaling float32 ``[adapters]``; adapter_of_row int64,
    one for each row of x (the product of its leading dimensions), -1 for the base alone. Differentiable in x, lora_a,
    lora_b and bias, once.
    """
    _registration.refuse_forward_mode(x, lora_a, lora_b, scaling, bias)
    return torch.ops.qlora.forward.multi(
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
        adapter_of_row,
        bias,
    )


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW in place, in one pass: ``param`` of any float dtype, moments in float32.

    All tensors are of one shape; param and the moments are contiguous. step counts from 1. Every operation is rounded
    by itself in float32, so the result is bitwise the same on every device.
    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2.
    """
    with torch.no_grad():
        torch.ops.qlora.adamw.default(param, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step)
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


def adamw_8bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """:func:`adamw` with moments in 8 bit, blocks of 256 along the flat order.

    exp_avg and exp_avg_sq are uint8 codes of the signed and of the unsigned dynamic map, with a float32 absmax for each
    block, ``[ceil(numel / 256)]``. A fresh state is codes and absmax of zero. A second moment that is not zero never
    rounds to zero, or the next step would divide by eps.
    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".
    """
    state = (exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)
    with torch.no_grad():
        torch.ops.qlora.adamw_8bit.default(param, grad, *state, lr, beta1, beta2, eps, weight_decay, step)
    torch.autograd.graph.increment_version((param, *state))


def adamw_many(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: Sequence[int],
) -> None:
    """:func:`adamw` or :func:`adamw_8bit` for many parameters on one device; the same bits. A GPU needs one launch for
    each sixteen.

    ``states`` has each parameter's moments in the order of those functions: all of two tensors, or all of four.
    """
    if not params:
        return
    columns = [list(column) for column in zip(*states, strict=True)]
    op = torch.ops.qlora.adamw.many if len(columns) == 2 else torch.ops.qlora.adamw_8bit.many
    with torch.no_grad():
        op(list(params), list(grads), *columns, lr, beta1, beta2, eps, weight_decay, list(steps))
    torch.autograd.graph.increment_version([*params, *(tensor for column in columns for tensor in column)])
