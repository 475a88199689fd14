"""``quantize``, ``dequantize`` and ``quantization_error``: weights to 4 bit and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora.ops.common import new_scales, refuse_quantization_gradient


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes a float32, bfloat16 or float16 weight of any shape to 4 bit, blockwise along the flat order.

    Returns ``(packed, absmax, nested_absmax, nested_offset)``: packed is uint8 ``[ceil(numel / 2)]``; absmax is float32
    ``[blocks]``, or uint8 codes with double quantization. The nested tensors are float32, ``[ceil(blocks / 256)]`` and
    ``[1]``, and empty without double quantization.

    Raises RuntimeError for an unknown quant_type, for a block size that is not a power of two in 32 … 4096, and, with
    check_finite, for nan or inf (the message gives the position).
    Source: Dettmers et al. 2023, "QLoRA"; docs/concepts/format.md.
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
    """The weight as a dense tensor of ``shape`` and ``dtype``: float32 level times float32 scale, rounded once.

    Tensors as returned by :func:`quantize`; ``dtype`` is float32, bfloat16 or float16.
    """
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
    """The difference between a 4-bit weight and ``weight``, without a temporary of the weight's size.

    Returns float64 ``[3]``: the sum of squared differences, the sum of squares of ``weight``, and the largest absolute
    difference.
    """
    return torch.ops.qlora.quantization_error(
        weight, packed, absmax, nested_absmax, nested_offset, quant_type, block_size
    )


torch.library.register_autograd("qlora::quantize", refuse_quantization_gradient)
torch.library.register_autograd("qlora::dequantize", refuse_quantization_gradient)


@torch.library.register_fake("qlora::quantize")
def _(
    weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True, check_finite: bool = True
) -> tuple[Tensor, ...]:
    packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    return packed, *new_scales(weight, block_size, double_quant)


@torch.library.register_fake("qlora::dequantize")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qlora::quantization_error")
def _(
    weight: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Tensor:
    return weight.new_empty(3, dtype=torch.float64)
