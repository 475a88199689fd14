"""Chooses the device and the dtype that a job computes with, and gives the reason for each choice."""

import warnings
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from qlora import _C
from qlora._load import has_cuda_ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO = "auto"
OLDEST_GPU = (7, 5)  # compute capability of the oldest GPUs that the kernels support
# Instruction sets with bfloat16 products, which the kernels of qlora and of torch use.
_BFLOAT16_ISAS = ("avx512bf16", "amx", "neonbf16")


T = TypeVar("T", torch.device, torch.dtype)


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A chosen device or dtype, and the reason in words."""

    value: T
    reason: str

    @property
    def name(self) -> str:
        """The value in words, e.g. ``cuda:0`` or ``bfloat16``."""
        return str(self.value).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def why_not_gpu(index: int | None = None) -> str | None:
    """Why qlora's operators cannot run on the GPU ``index`` (default: the current one); None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not has_cuda_ops():
        return "this build of qlora has no CUDA operators (see QLORA_CUDA in the README)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        return f"there are {count} GPUs, counted from 0"
    major, minor = torch.cuda.get_device_capability(index)
    return why_not_arch(major, minor)


def why_not_arch(major: int, minor: int, archs: tuple[int, ...] | None = None) -> str | None:
    """Why code compiled for ``archs`` (default: this build's) cannot run on a GPU of compute capability major.minor.

    None if it can. An arch is 10 * major + minor.
    """
    archs = _C.CUDA_ARCHS if archs is None else archs
    name, arch = f"sm_{major}{minor}", 10 * major + minor
    if (major, minor) < OLDEST_GPU:
        return f"the GPU is {name}: the kernels need sm_{OLDEST_GPU[0]}{OLDEST_GPU[1]} or newer"
    # Machine code runs on its own major version, from its minor version on. The PTX of the newest arch runs on all
    # newer GPUs.
    if not any(known // 10 == major and known <= arch for known in archs) and arch < max(archs, default=0):
        return f"the GPU is {name}: this build has code for {', '.join(f'sm_{known}' for known in archs)} only"
    return None


def choose_device(name: str = AUTO) -> Choice[torch.device]:
    """The device for ``name``: auto, cpu, cuda or cuda:N. auto takes a GPU that can run the operators, else the CPU.

    Raises ValueError for any other name, and for a GPU that does not exist or cannot run the operators.
    """
    if name == "cpu":
        return Choice(torch.device("cpu"), "as named")
    kind, _, number = name.partition(":")
    if name != AUTO and (kind != "cuda" or (number != "" and not number.isdigit()) or name.endswith(":")):
        raise ValueError(f"device='{name}' is unknown: use auto, cpu, cuda or cuda:N")
    index = int(number) if number else None
    problem = why_not_gpu(index)
    if problem is not None:
        if name == AUTO:
            return Choice(torch.device("cpu"), problem)
        raise ValueError(f"device='{name}' cannot be used: {problem}")
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return Choice(device, f"{torch.cuda.get_device_name(device)}, which can run qlora's operators")


def choose_dtype(name: str, device: torch.device, capability: tuple[int, int] | None = None) -> Choice[torch.dtype]:
    """The compute dtype for ``name``: auto, bf16, fp16 or fp32. auto takes the fast dtype of the device.

    ``capability`` of the GPU comes from torch unless it is given. Raises ValueError for any other name, and for fp16 on
    a CPU: training in fp16 needs a gradient scaler, which only GPUs have, and CPUs fast in fp16 are also fast in bf16.
    """
    if name not in (AUTO, *DTYPES):
        raise ValueError(f"compute_dtype='{name}' must be one of {AUTO}, {', '.join(DTYPES)}")
    if device.type == "cuda":
        if name != AUTO:
            return Choice(DTYPES[name], "as named")
        if (capability or torch.cuda.get_device_capability(device)) >= (8, 0):
            return Choice(torch.bfloat16, "the GPU has bf16 tensor cores")
        return Choice(torch.float16, "the GPU is older than sm_80, which brought bf16 tensor cores")
    if name == "fp16":
        raise ValueError("compute_dtype='fp16' is for GPUs: on a CPU use bf16 or fp32 (auto takes the faster one)")
    if name != AUTO:
        return Choice(DTYPES[name], "as named")
    if (reason := why_slow_in_bfloat16()) is None:
        return Choice(torch.bfloat16, f"the CPU multiplies in bf16 ({_C.active_isa()})")
    return Choice(torch.float32, reason)


_hinted = False


def hint_slow_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    """Warns, once per process, if training in bfloat16 on this CPU is slower than in float32."""
    global _hinted
    if _hinted or device.type != "cpu" or dtype != torch.bfloat16:
        return
    reason = why_slow_in_bfloat16()
    if reason is not None:
        _hinted = True
        warnings.warn(f"training in bfloat16: {reason}. Load the model with dtype=torch.float32", stacklevel=3)


def why_slow_in_bfloat16() -> str | None:
    """Why this CPU is slow in bfloat16; None if it has bfloat16 instructions."""
    isa = _C.active_isa()
    if isa in _BFLOAT16_ISAS:
        return None
    return f"the CPU ({isa}) has no bf16 instructions: a training step in bf16 takes at least 4 times as long"
