"""Pageable memory for optimizer state.

On the CPU it is mapped files: the system writes pages out when memory is short and reads them back on use. On a GPU it
is managed memory, whose pages the driver moves between device and host.
"""

import ctypes
import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Pages(Protocol):
    """Allocator of state tensors."""

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def prefetch(self, tensor: Tensor) -> None:
        """Hints that ``tensor`` is used next."""


class Resident:
    """Ordinary device memory, not paged."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def prefetch(self, tensor: Tensor) -> None:
        pass


class MappedFiles:
    """CPU tensors in mapped files of a folder. Each file is unlinked once mapped, so none outlives the process."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        descriptor, path = tempfile.mkstemp(dir=self._folder, prefix="qlora-state-")
        try:
            # Reserves the space now, so that a full disk is an error here and not a SIGBUS during a step.
            os.posix_fallocate(descriptor, 0, count * dtype.itemsize)
            tensor = torch.from_file(path, shared=True, size=count, dtype=dtype)
        except OSError as error:
            raise OSError(
                f"page_dir={self._folder}: no room for {count * dtype.itemsize / 2**20:.0f} MiB of optimizer state"
                f" ({error})"
            ) from error
        finally:
            os.close(descriptor)
            Path(path).unlink()
        return tensor.view(shape)

    def prefetch(self, tensor: Tensor) -> None:
        pass  # the system reads ahead


class _Driver:
    """The three CUDA driver calls that managed memory needs."""

    _ATTACH_GLOBAL = 1

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._library = ctypes.CDLL(library)

    def _check(self, name: str, result: int) -> None:
        if result != 0:
            raise RuntimeError(f"{name} failed with CUDA driver error {result}")

    def allocate(self, nbytes: int) -> int:
        pointer = ctypes.c_uint64()
        result = self._library.cuMemAllocManaged(
            ctypes.byref(pointer), ctypes.c_size_t(nbytes), ctypes.c_uint(self._ATTACH_GLOBAL)
        )
        self._check(f"cuMemAllocManaged({nbytes})", result)
        return pointer.value

    def free(self, pointer: int) -> None:
        self._library.cuMemFree_v2(ctypes.c_uint64(pointer))

    def prefetch(self, pointer: int, nbytes: int, device: int, stream: int) -> None:
        result = self._library.cuMemPrefetchAsync(
            ctypes.c_uint64(pointer), ctypes.c_size_t(nbytes), ctypes.c_int(device), ctypes.c_void_p(stream)
        )
        self._check("cuMemPrefetchAsync", result)


class _Allocation:
    """Managed bytes for torch through the CUDA array interface; freed with the last tensor that uses them."""

    def __init__(self, driver: Any, nbytes: int) -> None:
        pointer = driver.allocate(nbytes)
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }
        weakref.finalize(self, driver.free, pointer)


class ManagedMemory:
    """GPU tensors whose pages the driver moves between device and host."""

    def __init__(self, device: torch.device, driver: Any = None) -> None:
        self._device = device
        self._driver = driver or _Driver()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=dtype, device=self._device)
        with torch.cuda.device(self._device):
            raw = torch.as_tensor(_Allocation(self._driver, count * dtype.itemsize), device=self._device)
        return raw.zero_().view(dtype).view(shape)

    def prefetch(self, tensor: Tensor) -> None:
        if tensor.numel():
            stream = torch.cuda.current_stream(self._device).cuda_stream
            self._driver.prefetch(tensor.data_ptr(), tensor.nbytes, self._device.index or 0, stream)


def pages_for(device: torch.device, page_dir: str | Path | None, paged: bool) -> Pages:
    """The allocator for the state of a parameter on ``device``. Raises ValueError for page_dir with a GPU parameter."""
    if page_dir is not None and device.type != "cpu":
        raise ValueError(f"page_dir={page_dir} is for parameters on the CPU: these are on {device}")
    if device.type == "cuda" and paged:
        return ManagedMemory(device)
    if device.type == "cpu" and page_dir is not None:
        return MappedFiles(page_dir)
    return Resident(device)
