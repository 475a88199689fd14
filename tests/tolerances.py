"""Derived bounds on rounding errors; no number here was found by trying.

u = 2^-24 is float32's unit roundoff. A sum of K products, accumulated in float32 in any order, with each product
rounded (machines without FMA) or not, is off by at most (K + 2) * u * sum |a||b| (Higham 2002, section 3.1; the
second-order terms are below the slack of one unit for K < 2^20). Rounding the result to the output type adds eps / 2 *
|y|, and half the smallest subnormal step in float16.
"""

import torch
from torch import Tensor

U32 = 2.0**-24


def accumulation(steps: int, absolute_products: Tensor) -> Tensor:
    """Bound for a float32 sum of ``steps`` products whose absolute values sum up to ``absolute_products``."""
    return (steps + 2) * U32 * absolute_products


def multiplies_16_bit(device: str, dtype: torch.dtype) -> bool:
    """Whether operands are rounded to 16 bit on this device: tensor cores of a GPU, and the levels
    of a CPU that multiply bfloat16."""
    if device.startswith("cpu"):
        return device in ("cpu-amx", "cpu-avx512bf16") and dtype == torch.bfloat16
    return dtype != torch.float32


def operand_rounding(device: str, dtype: torch.dtype, absolute_products: Tensor) -> Tensor:
    """Bound for what tensor cores and tiles add in 16 bit: one operand of each product (a level or a weight, an
    activation of the low-rank term) is rounded to ``dtype`` once, by at most eps / 2 of itself."""
    if not multiplies_16_bit(device, dtype):
        return torch.zeros_like(absolute_products)
    return torch.finfo(dtype).eps / 2 * absolute_products


def split_rounding(device: str, dtype: torch.dtype, absolute_products: Tensor, small: Tensor) -> Tensor:
    """Bound for a product of two float32 factors and 16-bit tokens on tensor cores and tiles.

    They take a float32 factor as two parts of ``dtype``, high and low: rounded by eps / 2 of itself each, so their sum
    by (eps / 2)^2. In float16 the low part is also off by half the smallest number, which ``small`` weighs: the
    products with the factor replaced by ones."""
    if not multiplies_16_bit(device, dtype):
        return torch.zeros_like(absolute_products)
    bound = 2 * (torch.finfo(dtype).eps / 2) ** 2 * absolute_products
    return bound + 2.0**-25 * small if dtype == torch.float16 else bound


def factor_bounds(device, dtype, s, G, X, A, B, largest=None):
    """Bounds for d_lora_a and d_lora_b, of absolute values: d_lora_a = s (G B)ᵀ X, d_lora_b = s Gᵀ (X Aᵀ).

    A factor that is scaled into the range of float16 has its largest value at 2^14 or above, so what it loses there is
    2^-35 of it; ``largest`` is given where other rows of the batch may be larger."""
    (m, n), k = G.shape, X.shape[1]
    V, U = s * G @ B, s * X @ A.T
    largest_v, largest_u = (t * 2.0**-10 for t in largest or [0.0 if t.numel() == 0 else t.max() for t in (V, U)])
    small_a = (s * G.sum(1, keepdim=True) + largest_v).expand(m, V.shape[1]).T @ X
    small_b = G.T @ (s * X.sum(1, keepdim=True) + largest_u).expand(m, U.shape[1])
    return tuple(
        accumulation(steps, products) + split_rounding(device, dtype, products, small)
        for steps, products, small in ((m + n + 4, V.T @ X, small_a), (m + k + 4, G.T @ U, small_b))
    )


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
    """Root-mean-square error against float64: at most ``factor`` times that of torch's own dequantize -> matmul."""
    ours = (actual.double() - expected).square().mean().sqrt()
    theirs = (torch_result.double() - expected).square().mean().sqrt()
    assert ours <= factor * theirs, f"{ours:.3e} against {theirs:.3e}"
