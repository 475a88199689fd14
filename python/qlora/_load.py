"""Loads the compiled libraries: the pybind11 module ``_C`` and the op library, once."""

import warnings
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


CUDA_LIBRARY = "libqlora_cuda.so"


def _find_library(name: str) -> Path | None:
    # An installed package has its libraries beside this file, an editable install beside the compiled module.
    from qlora import _C

    for folder in (_PACKAGE, Path(_C.__file__).parent):
        path = folder / name
        if path.exists():
            return path
    return None


_cuda_library_is_broken = False


def has_cuda_ops() -> bool:
    """Whether ``torch.ops.qlora.*`` accepts CUDA tensors: this build has the kernels, and torch has CUDA."""
    return torch.version.cuda is not None and not _cuda_library_is_broken and _find_library(CUDA_LIBRARY) is not None


def _load_cuda() -> None:
    global _cuda_library_is_broken
    try:
        torch.ops.load_library(str(_find_library(CUDA_LIBRARY)))
    except OSError as error:  # the CPU operators still work
        _cuda_library_is_broken = True
        reason = error.__cause__ or error
        warnings.warn(f"{CUDA_LIBRARY} cannot be loaded, so qlora runs on the CPU only: {reason}", stacklevel=2)


def load_ops() -> None:
    """Registers ``torch.ops.qlora.*``. Idempotent: torch ignores a library that is already loaded.

    Raises ImportError if torch is older than 2.11 or the compiled CPU library is missing.
    """
    if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
        from qlora import _C

        raise ImportError(
            f"torch {torch.__version__} is too old: qlora needs the stable ABI of torch {_C.TORCH_TARGET} or newer"
        )
    cpu = _find_library("libqlora_cpu.so")
    if cpu is None:
        raise ImportError(
            f"libqlora_cpu.so is missing beside {_PACKAGE}: the package was installed without its compiled part"
        )
    torch.ops.load_library(str(cpu))
    if has_cuda_ops():
        _load_cuda()


load_ops()
