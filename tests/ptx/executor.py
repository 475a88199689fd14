"""Runs launches of the CUDA operators as nvcc's PTX, on an emulator that checks every memory access.

The operators run as on simt (see ``devices.py``), but launches go to the emulator in the folder PTXEMU (an environment
variable), with the kernel, grid and parameters that the host code chose and with translated pointers. Each tensor of
the call is a buffer in the emulator; uninitialized tensors stay uninitialized until a kernel writes them.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import devices
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90")
CODE = {"sm_86": "sm_80"}  # runs the PTX of sm_80, with less shared memory and other thresholds
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Wno-deprecated-gpu-targets", f"-I{ROOT / 'csrc'}")
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_int64,
)


def why_not() -> str:
    """Why these tests cannot run; empty if they can."""
    if "PTXEMU" not in os.environ:
        return "PTXEMU does not name the folder of a PTX emulator"
    if devices.simt_library() is None:
        return "libqlora_simt.so was not built"
    try:
        subprocess.run(["nvcc", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "nvcc is not installed"
    return ""


@functools.cache
def emulator():
    # It builds itself on first use, so it is copied, because its own folder may be read-only.
    copy = ROOT / "build" / "ptxemu"
    shutil.copytree(os.environ["PTXEMU"], copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build", ".*"))
    sys.path.insert(0, str(copy))
    import ptxemu

    return ptxemu


@functools.cache
def ptx_of(source: Path, arch: str) -> Path:
    """The PTX of a .cu file, compiled unless it is newer than every source."""
    if arch == "sm_90" and source.stem.endswith("_wgmma"):
        arch = "sm_90a"  # instructions that only Hopper has
    folder = ROOT / "build" / "ptx" / arch
    folder.mkdir(parents=True, exist_ok=True)
    ptx = folder / (source.stem + ".ptx")
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cu", ".cuh"})
    if not ptx.exists() or ptx.stat().st_mtime < newest:
        command = ["nvcc", "-ptx", f"-arch={arch}", *FLAGS, str(source), "-o", str(ptx)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    return ptx


@functools.cache
def kernels(arch: str) -> dict:
    """The module that contains each kernel, by the kernel's symbol."""
    found = {}
    for source in SOURCES:
        module = emulator().Module.from_ptx(str(ptx_of(source, CODE.get(arch, arch))))
        found |= {kernel["name"]: module for kernel in module.kernels()}
    return found


LAUNCHED: dict[str, set[str]] = {arch: set() for arch in ARCHS}  # kernels that have run without an error


class Memory:
    """The tensors of one operator call, on the host and in the emulator."""

    def __init__(self) -> None:
        self.ranges: dict[int, tuple[int, bool]] = {}  # address -> (bytes, initialized)
        self.buffers: dict[int, tuple] = {}  # address -> (buffer, bytes as last seen on both sides)
        self.keep: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor, initialised: bool) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self.ranges:
            self.ranges[storage.data_ptr()] = (storage.nbytes(), initialised)
            self.keep.append(tensor)

    def mark_initialised(self, tensor: torch.Tensor) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address in self.ranges:
            self.ranges[address] = (self.ranges[address][0], True)

    def host(self, address: int) -> np.ndarray:
        size = self.ranges[address][0]
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def translate(self, word: int, module) -> int | None:
        for address, (size, initialised) in self.ranges.items():
            if address <= word < address + size:
                if address not in self.buffers:
                    buffer = module.alloc(size, init=initialised, name=f"tensor of {size} bytes")
                    if initialised:
                        buffer.write(self.host(address))
                    self.buffers[address] = (buffer, self.host(address).copy())
                return self.buffers[address][0].ptr + word - address
        return None

    def to_emulator(self) -> None:
        """Copies what the host has written since the last launch."""
        for address, (buffer, seen) in self.buffers.items():
            host = self.host(address)
            if not np.array_equal(host, seen):
                buffer.write(host)
                self.buffers[address] = (buffer, host.copy())

    def to_host(self) -> None:
        for address, (buffer, _) in self.buffers.items():
            values = buffer.numpy(np.uint8)
            self.host(address)[:] = values
            self.buffers[address] = (buffer, values.copy())

    def free(self) -> None:
        for buffer, _ in self.buffers.values():
            buffer.free()


class _LogAllocations(TorchDispatchMode):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.memory.add(result, initialised="empty" not in function.name())
            if function._schema.is_mutable:  # such as fill_
                self.memory.mark_initialised(result)
        return result


class Executor:
    """Launches on the emulator; ``results`` collects the counters of each launch by kernel name."""

    def __init__(self, arch: str, seed: int, **options) -> None:
        self.arch, self.options, self.results = arch, {"schedule": "random", "seed": seed} | options, []
        self.memory = Memory()
        self.failure: Exception | None = None
        self.text = ctypes.create_string_buffer(1)

    def launch(self, name, grid, threads, shared_bytes, params, params_bytes):
        try:
            module = kernels(self.arch)[name.decode()]
            raw = bytearray(ctypes.string_at(params, params_bytes))
            self.memory.to_emulator()
            for offset in range(0, len(raw) - 7, 8):
                translated = self.memory.translate(int.from_bytes(raw[offset : offset + 8], "little"), module)
                if translated is not None:
                    raw[offset : offset + 8] = translated.to_bytes(8, "little")
            extents = tuple(grid[i] for i in range(3))
            result = module.launch(name.decode(), extents, threads, [bytes(raw)], shared=shared_bytes, **self.options)
            assert not result.warnings, "\n".join(warning["text"] for warning in result.warnings)
            self.results.append(result)
            LAUNCHED[self.arch].add(name.decode())
            self.memory.to_host()
        except Exception as error:  # a Python exception must not propagate through C++ frames
            self.failure = error
            self.text = ctypes.create_string_buffer(str(error)[:4000].encode())
            return ctypes.addressof(self.text)
        return None

    def call(self, op, *args, **kwargs):
        """One operator call; checks that every returned tensor was written completely."""
        self.memory = Memory()
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self.memory.add(tensor, initialised=True)
        try:
            with _LogAllocations(self.memory):
                outputs = op.redispatch(devices.KEY, *args, **kwargs)
            for output in outputs if isinstance(outputs, tuple) else (outputs,) if outputs is not None else ():
                entry = self.memory.buffers.get(output.untyped_storage().data_ptr())
                if entry is not None:
                    assert entry[0].unwritten() == 0, f"{entry[0].unwritten()} bytes of an output were never written"
        finally:
            self.memory.free()
        return outputs


@contextlib.contextmanager
def ptx(arch: str, seed: int = 1, sm_count: int = 4, **options):
    """Runs the PTX of the CUDA kernels on CPU tensors."""
    executor = Executor(arch, seed, **options)
    with devices.simt(arch=int(arch[3:]), sm_count=sm_count, call=executor.call) as library:
        callback = LAUNCHER(executor.launch)
        library.qlora_simt_launcher(callback)
        try:
            yield executor
        finally:
            library.qlora_simt_launcher(None)
