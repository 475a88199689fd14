# Types of the compiled module (csrc/bindings/module.cpp).

QUANT_TYPES: tuple[str, ...]
FP4_THRESHOLDS: tuple[float, ...]
FP4_CODE_OF_RANK: tuple[int, ...]
MIN_BLOCK_SIZE: int
MAX_BLOCK_SIZE: int
NESTED_BLOCK: int
DECODE_TOKENS: int
COMPILER: str
BUILD_TORCH: str
TORCH_TARGET: str

def runnable_isas() -> list[str]: ...
def active_isa() -> str: ...
def codebook(quant_type: str) -> list[float]: ...
def dynamic_map() -> list[float]: ...
def explain_forward(m: int, k: int) -> tuple[str, str]: ...
