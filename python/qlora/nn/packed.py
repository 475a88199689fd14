"""PackedMatrix: base class of layers with one 4-bit matrix. It holds the tensors and protects them from casts."""

from typing import Any

import torch
from torch import Tensor, nn

from qlora.weight import QuantizedWeight

STATISTICS = ("absmax", "nested_absmax", "nested_offset")


def restore_dtypes(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """Undoes casts of buffers by ``_apply`` but keeps their new device, because a rounded scale changes the weight.

    ``before`` maps the names of the buffers to their tensors before ``_apply``.
    """
    for name, tensor in before.items():
        moved = module._buffers[name]
        assert tensor is not None
        assert moved is not None
        if moved.dtype != tensor.dtype:
            module._buffers[name] = tensor.to(moved.device)


class PackedMatrix(nn.Module):
    """A layer with a frozen 4-bit matrix.

    ``weight`` is a uint8 parameter (rows, columns / 2), or flat if the number of columns is odd. The statistics are
    buffers ``absmax``, ``nested_absmax`` and ``nested_offset``, which keep their dtype under ``.to(dtype)``.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    quant_type: str
    block_size: int
    original_dtype: torch.dtype

    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        raise NotImplementedError

    def adopt(self, weight: QuantizedWeight) -> None:
        """Uses the tensors and the format of ``weight``, a matrix, without a copy."""
        rows, columns = weight.shape
        packed = weight.packed.view(rows, columns // 2) if columns % 2 == 0 else weight.packed
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name in STATISTICS:
            self.register_buffer(name, getattr(weight, name))
        self.quant_type, self.block_size = weight.quant_type, weight.block_size
        self.original_dtype = weight.dtype

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The matrix and its statistics, as views."""
        return QuantizedWeight(
            self.weight.detach().flatten(),
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.matrix_shape(),
            self.quant_type,
            self.block_size,
            self.original_dtype,
        )

    @property
    def hidden_numel(self) -> int:
        """Weights minus elements of ``weight``: a count of parameters misses this many, at two weights per byte."""
        rows, columns = self.matrix_shape()
        return rows * columns - self.weight.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole dense matrix, in ``dtype`` (default: the dtype before quantization)."""
        return self.quantized_weight.dequantize(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedMatrix":
        before = {name: self._buffers[name] for name in STATISTICS}
        super()._apply(fn, recurse)
        restore_dtypes(self, before)
        return self
