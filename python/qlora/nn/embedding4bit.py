"""Embedding4bit: an ``nn.Embedding`` whose table is frozen in 4 bit."""

from typing import Any

import torch
from torch import Tensor, nn

from qlora import ops, reference
from qlora.nn.linear4bit import STATISTICS, restore_dtypes
from qlora.weight import QuantizedWeight, quantize


class Embedding4bit(nn.Embedding):
    """Rows of a table in 4 bit; only those that are asked for are decoded.

    ``weight`` is a frozen uint8 parameter (rows, width / 2), the statistics are buffers as in ``Linear4bit``. Results
    are of ``original_dtype``. The width is a multiple of the block size, so that a row is whole blocks.
    """

    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    def adopt(self, weight: QuantizedWeight) -> None:
        """Takes over the tensors and the format of ``weight`` (rows, width), without a copy."""
        rows, width = weight.shape
        if width % weight.block_size:
            raise ValueError(f"the width {width} of an embedding must be a multiple of block_size={weight.block_size}")
        self.weight = nn.Parameter(weight.packed.view(rows, width // 2), requires_grad=False)
        for name in STATISTICS:
            self.register_buffer(name, getattr(weight, name))
        self.quant_type, self.block_size = weight.quant_type, weight.block_size
        self.original_dtype = weight.dtype

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64
    ) -> "Embedding4bit":
        """Quantizes the table of ``embedding``. Raises ValueError if it renormalizes its rows (max_norm)."""
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm={embedding.max_norm} changes the table at each call: it cannot be in 4 bit")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"):
            setattr(layer, name, getattr(embedding, name))
        layer.sparse = False
        layer.adopt(quantize(embedding.weight, quant_type, block_size, double_quant))
        return layer.train(embedding.training)

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The table and its statistics, as views."""
        return QuantizedWeight(
            self.weight.detach().flatten(),
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            (self.num_embeddings, self.embedding_dim),
            self.quant_type,
            self.block_size,
            self.original_dtype,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole table as a dense (rows, width) tensor."""
        return self.quantized_weight.dequantize(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.flatten()
        blocks = self.embedding_dim // self.block_size
        block_of_row = rows.unsqueeze(1) * blocks + torch.arange(blocks, device=rows.device)
        scales = self.absmax[block_of_row]
        if self.nested_absmax.numel():
            scales = reference.nested_scales(scales, self.nested_absmax, self.nested_offset, block_of_row)
        decoded = ops.dequantize(
            self.weight[rows].flatten(),
            scales.flatten(),
            None,
            None,
            (rows.numel(), self.embedding_dim),
            self.quant_type,
            self.block_size,
            self.original_dtype,
        )
        return decoded.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> "Embedding4bit":
        before = {name: self._buffers[name] for name in STATISTICS}
        super()._apply(fn, recurse)
        restore_dtypes(self, before)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}"
