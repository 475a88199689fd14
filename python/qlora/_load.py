"""Loads the compiled libraries: the pybind11 module ``_C`` and the op library, once."""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def _library_path(name: str) -> Path:
    # An installed package keeps its libraries beside this file; an editable one beside the compiled module.
    from qlora import _C

    for folder in (_PACKAGE, Path(_C.__file__).parent):
        path = folder / name
        if path.exists():
            return path
    raise ImportError(f"{name} is missing beside {_PACKAGE}: the package was installed without its compiled part")


def load_ops() -> None:
    """Registers ``torch.ops.qlora.*`` (idempotent: torch ignores a library that is loaded already)."""
    if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
        from qlora import _C

        raise ImportError(
            f"torch {torch.__version__} is too old: qlora needs the stable ABI of torch {_C.TORCH_TARGET} or newer"
        )
    torch.ops.load_library(str(_library_path("libqlora_cpu.so")))


load_ops()
