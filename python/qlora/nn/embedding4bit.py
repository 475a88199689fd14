"""Embedding4bit: an ``nn.Embedding`` whose table is frozen in 4 bit."""

import torch
from torch import Tensor, nn

from qlora import ops, reference
from qlora.nn.packed import PackedMatrix
from qlora.weight import QuantizedWeight, quantize


class Embedding4bit(PackedMatrix, nn.Embedding):
    """A table in 4 bit of which only the rows that are asked for are decoded.

    ``weight`` is a frozen uint8 parameter (rows, width / 2), the statistics are buffers as in ``Linear4bit``. Results
    are of ``original_dtype``. The width is a multiple of the block size, so that a row is whole blocks.
    """

    def adopt(self, weight: QuantizedWeight) -> None:
        """Takes over the tensors and the format of ``weight`` (rows, width), without a copy."""
        width = weight.shape[1]
        if width % weight.block_size:
            raise ValueError(f"the width {width} of an embedding must be a multiple of block_size={weight.block_size}")
        super().adopt(weight)

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

    def matrix_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}"
