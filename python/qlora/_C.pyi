# Types of the compiled module (csrc/bindings/module.cpp).
from typing import Any

QUANT_TYPES: tuple[str, ...]
BITSANDBYTES_QUANT_TYPES: tuple[str, ...]
FP4_THRESHOLDS: tuple[float, ...]
FP4_CODE_OF_RANK: tuple[int, ...]
MIN_BLOCK_SIZE: int
MAX_BLOCK_SIZE: int
NESTED_BLOCK: int
SCALE_FACTORS: tuple[float, ...]
MOMENT_BLOCK: int
GEMV_TOKENS: int
EXPERT_ROWS: int
GPU_PANEL_BYTES: int
CUDA_ARCHS: tuple[int, ...]
COMPILER: str
BUILD_TORCH: str
TORCH_TARGET: str

def runnable_isas() -> list[str]: ...
def preferred_isa() -> str: ...
def active_isa() -> str: ...
def codebook(quant_type: str) -> list[float]: ...
def dynamic_map() -> list[float]: ...
def unsigned_dynamic_map() -> list[float]: ...
def level_multiplier(quant_type: str, dtype: str) -> float: ...
def explain_forward(m: int, k: int, dtype: str) -> dict[str, str]: ...
def cuda_select(
    m: int,
    n: int,
    k: int,
    dtype: str,
    block_size: int,
    arch: int,
    sm_count: int,
    shared_bytes_per_block: int,
    has_wgmma: bool | None = None,
    rank: int = 16,
    experts: int = 1,
) -> dict[str, Any]: ...
