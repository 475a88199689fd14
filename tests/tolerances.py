"""Bounds on rounding errors, all derived from theory, none found by trial.

u = 2^-24 is float32's unit roundoff. A sum of K products, accumulated in float32 in any order, with each product
rounded (machines without FMA) or not, has an error of at most (K + 2) * u * sum |a||b| (Higham 2002, section 3.1; the
second-order terms are smaller than the extra unit for K < 2^20). ARM's bfmmla rounds to odd, by up to 2 u, but
adds pairs of products, so that each passes through at most K / 2 + 1 roundings: the same bound. Rounding the result to
the output type adds eps / 2 * |y|, in float16 also half the smallest subnormal step.
"""

import torch
from torch import Tensor

U32 = 2.0**-24


def accumulation(steps: int, absolute_products: Tensor) -> Tensor:
    """Bound for a float32 sum of ``steps`` products whose absolute values add up to ``absolute_products``."""
    return (steps + 2) * U32 * absolute_products


def multiplies_16_bit(device: str, dtype: torch.dtype) -> bool:
    """Whether this device rounds operands to 16 bit: GPUs with tensor cores, and CPU levels that multiply bfloat16."""
    if device.startswith("cpu"):
        return device in ("cpu-amx", "cpu-avx512bf16", "cpu-neonbf16") and dtype == torch.bfloat16
    return dtype != torch.float32


def operand_rounding(device: str, dtype: torch.dtype, absolute_products: Tensor) -> Tensor:
    """Bound for the rounding of operands on tensor cores and in CPU tiles.

    One operand of each product (a level, a weight, or an activation of the low-rank term) is rounded to ``dtype`` once,
    by at most eps / 2 of its value.
    """
    if not multiplies_16_bit(device, dtype):
        return torch.zeros_like(absolute_products)
    return torch.finfo(dtype).eps / 2 * absolute_products


def level_rounding(device: str, dtype: torch.dtype, tokens: int, absolute_products: Tensor) -> Tensor:
    """Bound for the rounding of levels by AVX2's kernel for few bfloat16 tokens, in the forward only."""
    if device != "cpu-avx2" or dtype != torch.bfloat16 or tokens > 8:
        return torch.zeros_like(absolute_products)
    return torch.finfo(dtype).eps / 2 * absolute_products


def split_rounding(device: str, dtype: torch.dtype, absolute_products: Tensor, small: Tensor) -> Tensor:
    """Bound for a product of two float32 factors and 16-bit tokens on tensor cores and in CPU tiles.

    The kernels split a float32 factor into a high and a low part of ``dtype``. Each is rounded by eps / 2 of its value,
    so their sum by (eps / 2)^2. In float16 the low part also has an error of half the smallest number; ``small`` is the
    sum of the products with the factor replaced by ones.
    """
    if not multiplies_16_bit(device, dtype):
        return torch.zeros_like(absolute_products)
    bound = 2 * (torch.finfo(dtype).eps / 2) ** 2 * absolute_products
    return bound + 2.0**-25 * small if dtype == torch.float16 else bound


def output_rounding(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound for one rounding of ``y`` to ``dtype``."""
    info = torch.finfo(dtype)
    return info.eps / 2 * y.abs() + info.smallest_normal * info.eps


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element of ``actual`` is within ``bound`` of the float64 ``expected``."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    worst = (error - bound).max() if error.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"error {error.max():.3e} exceeds its bound by {worst:.3e}"


def assert_error_at_most(factor: float, actual: Tensor, torch_result: Tensor, expected: Tensor) -> None:
    """The root-mean-square error against float64 is at most ``factor`` times that of torch's dequantize and matmul."""
    ours = (actual.double() - expected).square().mean().sqrt()
    theirs = (torch_result.double() - expected).square().mean().sqrt()
    assert ours <= factor * theirs, f"{ours:.3e} against {theirs:.3e}"
