"""Selects the device of an operator in a test: a CPU kernel level, the CUDA kernels on the CPU (simt), or a GPU.

simt: ``libqlora_simt.so`` registers the CUDA operators under a separate dispatch key. While a test runs on it, the
dispatcher's CPU entries call that key, so that everything above them (autograd, fake kernels, autocast, layers) is the
code that users run.
"""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import torch

from qlora import _C, _load

KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse3)
# Every operator; one without a CUDA implementation raises an error on simt.
NAMES = tuple(
    name.removeprefix("qlora::")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    if name.startswith("qlora::")
)
LIBRARY = os.environ.get("QLORA_SIMT_LIBRARY", Path(__file__).parents[1] / "build/tests/tests/simt/libqlora_simt.so")


# Largest shared memory of a block in KiB, by compute capability.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


class Counters(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "launches",
            "barriers",
            "mma",
            "global_load_bytes",
            "global_load_sectors",
            "global_load_ideal",
            "global_store_bytes",
            "global_store_sectors",
            "global_store_ideal",
            "shared_load_waves",
            "shared_load_ideal",
            "shared_store_waves",
            "shared_store_ideal",
        )
    ]


@functools.cache
def simt_library() -> ctypes.CDLL | None:
    """The loaded library; None if it was not built. A path in QLORA_SIMT_LIBRARY must exist."""
    if not Path(LIBRARY).exists():
        if "QLORA_SIMT_LIBRARY" in os.environ:
            raise FileNotFoundError(f"QLORA_SIMT_LIBRARY={LIBRARY} does not exist")
        return None
    torch.ops.load_library(str(LIBRARY))
    library = ctypes.CDLL(str(LIBRARY))
    library.qlora_simt_counters.restype = ctypes.POINTER(Counters)
    library.qlora_simt_last_range.restype = ctypes.c_char_p
    library.qlora_simt_seed.argtypes = [ctypes.c_uint64]
    return library


def available() -> list[str]:
    devices = [f"cpu-{isa}" for isa in _C.runnable_isas()]
    if simt_library() is not None:
        full = [f"simt-sm_{arch}-seed{seed}" for arch in (75, 80, 86, 90) for seed in (1, 2, 3)]
        devices += full if "QLORA_TEST_FULL" in os.environ else ["simt"]
    if torch.cuda.is_available() and _load.has_cuda_ops():
        devices.append("cuda")
    return devices


def _overload(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.qlora, packet), overload or "default")


@contextlib.contextmanager
def simt(
    seed: int = 1,
    arch: int = 80,
    sm_count: int = 4,
    shared_bytes: int | None = None,
    panel_bytes=_C.GPU_PANEL_BYTES,
    call=None,
):
    """Runs CUDA kernels on CPU tensors with the simt executor, which simulates the described GPU.

    ``call(op, *args)`` can add code around the redispatch of an operator.
    """
    library = simt_library()
    assert library is not None
    library.qlora_simt_seed(seed)
    library.qlora_simt_gpu(arch, sm_count, shared_bytes or SHARED_KIB[arch] * 1024, panel_bytes)
    overrides = torch.library.Library("qlora", "IMPL")
    for name in NAMES:
        op = _overload(name)
        function = functools.partial(call, op) if call else functools.partial(op.redispatch, KEY)
        overrides.impl(name, function, "CPU", allow_override=True)
    try:
        yield library
    finally:
        overrides._destroy()


def counters(library: ctypes.CDLL) -> dict[str, int]:
    """Counters since the last qlora_simt_reset()."""
    values = library.qlora_simt_counters().contents
    return {name: getattr(values, name) for name, _ in Counters._fields_}
