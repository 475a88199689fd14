"""Shapes and types that every test of an operator runs: odd ones are the default."""

import torch

from qlora import ops

QUANT_TYPES = ops.QUANT_TYPES
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# (m, n, k): empty batch, one row, primes, k not a multiple of the block, odd numel, more than one tile and panel.
SHAPES = (
    (0, 8, 64),
    (1, 1, 1),
    (1, 64, 128),
    (1, 37, 96),
    (3, 5, 37),
    (7, 33, 100),
    (8, 130, 576),
    (9, 64, 64),
    (17, 3, 7),
    (53, 67, 101),
    (130, 70, 300),
    (33, 136, 192),  # tensor cores: part of a tile of tokens, rows and chunks
    (70, 72, 2112),  # more chunks than one panel of scales has
    (12, 200, 128),  # enough rows for two fragments a warp, few tokens
    (200, 264, 64),  # and many: the largest tile, part of it
)


def name_of(shape: tuple[int, int, int]) -> str:
    return "m{}-n{}-k{}".format(*shape)


def weights(n: int, k: int, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True):
    """A random weight in the format: (arguments of the operators, float64 dequantized matrix)."""
    import qlora

    w = qlora.quantize(torch.randn(n, k), quant_type, block_size, double_quant)
    return (*w.tensors, [n, k], quant_type, block_size), qlora.reference.dequantize(
        *w.tensors, [n, k], quant_type, block_size, torch.float64
    )
