"""Reports which kernel a call uses, and why it does not use a faster one, so that no fallback is silent."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora import _C
from qlora._load import has_cuda_ops
from qlora.ops import FLOAT_DTYPES
from qlora.weight import QuantizedWeight

_CUDA_CHOICES = ("why_not_faster",) + tuple(
    prefix + name for name in ("backward", "gradients", "low_rank") for prefix in ("", "why_not_faster_")
)


@dataclass(frozen=True)
class Explanation:
    """How ``qlora.ops.forward`` computes one input and one weight."""

    device: str  # cpu or cuda
    isa: str  # instruction set in use
    kernel: str  # gemv_words, gemv_elements, tiles or gemm; on a GPU gemv, gemm, dequantize_matmul or general
    compute: str  # precision of products and sums
    why_not_faster: str  # empty if the fastest kernel is used
    backward: str = "gemm"  # of the input's gradient: gemm or tiles; on a GPU gemm_dx, dequantize_matmul or general
    why_not_faster_backward: str = ""
    gradients: str = "gemm"  # kernel of the gradients of lora_a and lora_b; on a GPU lora_grad or general
    why_not_faster_gradients: str = ""
    low_rank: str = "gemm"  # of x lora_aᵀ: dot, gemm or tiles; on a GPU lora_down or token_dot
    why_not_faster_low_rank: str = ""

    def __str__(self) -> str:
        reason = f" ({self.why_not_faster})" if self.why_not_faster else ""
        return f"{self.device}/{self.isa}: {self.kernel}, {self.compute}{reason}"


def _explain_cuda(x: Tensor, weight: QuantizedWeight, tokens: int, rank: int) -> Explanation:
    if not has_cuda_ops():
        raise ValueError(f"x is on {x.device}: this build has kernels for the CPU only (see QLORA_CUDA in the README)")
    gpu: Any = torch.cuda.get_device_properties(x.device)
    n, k = weight.shape
    chosen = _C.cuda_select(
        tokens,
        n,
        k,
        str(x.dtype).removeprefix("torch."),
        weight.block_size,
        min(10 * gpu.major + gpu.minor, _C.CUDA_ARCHS[-1]),  # a newer GPU runs the newest compiled code
        gpu.multi_processor_count,
        gpu.shared_memory_per_block_optin,
        (gpu.major, gpu.minor) == (9, 0) and 90 in _C.CUDA_ARCHS,
        rank,
    )
    return Explanation(
        device="cuda",
        isa=f"sm_{gpu.major}{gpu.minor}",
        compute="float32 products and sums, rounded once"
        if chosen["forward"] == "general" or x.dtype == torch.float32
        else "16-bit products on tensor cores, float32 sums",
        kernel=chosen["forward"],
        **{name: chosen[name] for name in _CUDA_CHOICES},
    )


def explain(x: Tensor, weight: QuantizedWeight, rank: int = 16) -> Explanation:
    """The kernels that ``forward`` uses for ``x`` [..., k] and ``weight`` (n, k), without running them.

    ``rank`` is that of an adapter; it decides over the kernel of its down projection on a GPU.

    Raises ValueError if the shapes of x and weight do not match, or no kernel supports the dtype or device of x.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x is {x.dtype}: the kernels support float32, bfloat16 and float16")
    if len(weight.shape) != 2 or x.dim() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)} and weight {weight.shape}: they must be [..., k] and (n, k)")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features: the weight has in_features={weight.shape[1]}")
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    tokens = x.numel() // max(1, x.shape[-1])
    if x.device.type == "cuda":
        return _explain_cuda(x, weight, tokens, rank)
    if x.device.type != "cpu":
        raise ValueError(f"x is on {x.device}: kernels exist only for the CPU and for CUDA")
    chosen = _C.explain_forward(tokens, weight.shape[1], str(x.dtype).removeprefix("torch."))
    reasons = [reason] if (reason := chosen.pop("why_not_faster")) else []
    isa, preferred = _C.active_isa(), _C.preferred_isa()
    if isa != preferred:
        reasons.append(f"QLORA_CPU_ISA chooses {isa}, this machine's fastest level is {preferred}")
    products = "bfloat16 products of W rounded once" if chosen["kernel"] == "tiles" else "float32 products"
    return Explanation(
        device="cpu",
        isa=isa,
        compute=f"{products}, float32 sums, rounded once",
        why_not_faster="; ".join(reasons),
        **chosen,
    )
