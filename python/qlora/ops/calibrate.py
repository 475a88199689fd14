"""``search_scales`` and ``quantize_with_feedback``: 4-bit weights with less error in a layer's outputs."""

import torch
from torch import Tensor

from qlora.ops.common import new_scales, refuse_quantization_gradient


def search_scales(
    weight: Tensor,
    importance: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of each block with the least ``sum over j of importance[j] * (error of column j)^2``.

    weight float32 (n, k), importance float32 [k], at least 0: the mean square of input j makes the sum the error of the
    outputs for uncorrelated inputs. Tries 32 factors from 0.48 to 1.10 times a block's largest absolute value.

    Returns ``(absmax, nested_absmax, nested_offset)`` as :func:`qlora.ops.quantize` does. Raises RuntimeError for wrong
    shapes and dtypes and for nan or inf in the weight.
    """
    return torch.ops.qlora.search_scales(weight, importance, quant_type, block_size, double_quant)


def quantize_with_feedback(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Packs the codes of ``weight`` for given scales; the error of each column changes the columns after it.

    weight float32 (n, k); scales as returned by :func:`search_scales`. ``order`` int64 [k] names the column of each
    step (default: in order). Step i rounds ``weight[:, order[i]] + sum over j < i of feedback[i, j] * error[:, j]``,
    where ``error[:, j]`` is the exact minus the quantized column of step j. ``feedback`` is float32 (k, k), read below
    its diagonal; without it each weight gets its nearest level.

    Returns packed, uint8 ``[ceil(n * k / 2)]``. The codes are the same on every device. Raises RuntimeError for wrong
    shapes and dtypes, for an order that is no permutation, and for nan or inf.
    Source: Frantar et al. 2023, "GPTQ"; Chee et al. 2023, "QuIP", for the form without an inverse.
    """
    return torch.ops.qlora.quantize_with_feedback(
        weight, absmax, nested_absmax, nested_offset, quant_type, block_size, feedback, order
    )


torch.library.register_autograd("qlora::search_scales", refuse_quantization_gradient)
torch.library.register_autograd("qlora::quantize_with_feedback", refuse_quantization_gradient)


@torch.library.register_fake("qlora::search_scales")
def _(
    weight: Tensor, importance: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> tuple[Tensor, ...]:
    return new_scales(weight, block_size, double_quant)


@torch.library.register_fake("qlora::quantize_with_feedback")
def _(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    return weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
