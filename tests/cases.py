"""Shapes and types for all tests of operators; odd ones are the default."""

import torch

from qlora import ops

QUANT_TYPES = ops.QUANT_TYPES
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# (m, n, k): empty batch, one row, primes, k not a multiple of the block, odd numel, several tiles and panels.
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
    (33, 136, 192),  # tensor cores: partial tiles of tokens and rows, a partial chunk
    (70, 72, 2112),  # more chunks than one panel of scales
    (12, 200, 128),  # few tokens, enough rows for two fragments per warp
    (200, 264, 64),  # many tokens: partial tiles of the largest size
)


def name_of(shape: tuple[int, int, int]) -> str:
    return "m{}-n{}-k{}".format(*shape)


def weights(n: int, k: int, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = True):
    """A random quantized weight: (arguments for the operators, float64 dequantized matrix)."""
    import qlora

    w = qlora.quantize(torch.randn(n, k), quant_type, block_size, double_quant)
    return (*w.tensors, [n, k], quant_type, block_size), qlora.reference.dequantize(
        *w.tensors, [n, k], quant_type, block_size, torch.float64
    )
