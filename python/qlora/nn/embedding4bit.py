"""Embedding4bit: an ``nn.Embedding`` whose table is frozen in 4 bit."""

import torch
from torch import Tensor, nn

from qlora import ops
from qlora.nn.packed import PackedMatrix
from qlora.nn.replacing import require_plain
from qlora.tables import nested_scales
from qlora.weight import QuantizedWeight, quantize


class Embedding4bit(PackedMatrix, nn.Embedding):
    """An embedding table in 4 bit. A forward dequantizes only the rows that it looks up.

    ``weight`` is a frozen uint8 parameter (rows, width / 2); the statistics are buffers as in ``Linear4bit``. Outputs
    have ``original_dtype``. The width must be a multiple of the block size, so that each row consists of whole blocks.
    """

    def adopt(self, weight: QuantizedWeight) -> None:
        """Uses the tensors and the format of ``weight`` (rows, width), without a copy.

        Raises ValueError if the width is not a multiple of the block size.
        """
        width = weight.shape[1]
        if width % weight.block_size:
            raise ValueError(f"the width {width} of an embedding must be a multiple of block_size={weight.block_size}")
        super().adopt(weight)

    @classmethod
    @torch.inference_mode(False)
    def from_embedding(
        cls, embedding: nn.Embedding, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64
    ) -> "Embedding4bit":
        """Quantizes the table of ``embedding``.

        Raises ValueError if it renormalizes its rows (max_norm) or computes more than nn.Embedding: a subclass with its
        own forward (e.g. a scale), a parametrization, or hooks.
        """
        require_plain(embedding, nn.Embedding)
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm={embedding.max_norm} changes the table at each call: it cannot be 4-bit")
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
        # torch.embedding rejects negative ids; indexing would count them from the end.
        scales = torch.embedding(self.absmax.view(-1, blocks), rows)
        if self.nested_absmax.numel():
            block_of_row = rows.unsqueeze(1) * blocks + torch.arange(blocks, device=rows.device, dtype=torch.int64)
            scales = nested_scales(scales, self.nested_absmax, self.nested_offset, block_of_row)
        dense = ops.dequantize(
            torch.embedding(self.weight, rows).flatten(),
            scales.flatten(),
            None,
            None,
            (rows.numel(), self.embedding_dim),
            self.quant_type,
            self.block_size,
            self.original_dtype,
        )
        return dense.view(*ids.shape, self.embedding_dim)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """A frozen dense embedding with the dequantized table, in ``dtype`` or the dtype before quantization."""
        return self.dense_twin(self.dequantize(dtype))

    def dense_twin(self, table: Tensor) -> nn.Embedding:
        """A frozen dense embedding with ``table`` (rows, width) and the settings of this one."""
        dense = nn.Embedding.from_pretrained(
            table, freeze=True, padding_idx=self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}"
