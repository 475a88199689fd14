"""Measures times of contenders in alternation, and the limits of the machine."""

import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

Contender = Callable[[int], object]  # runs one call with weight number i

ROUND_SECONDS = 0.03  # a contender's turn is at least this long
WARMUP_CALLS = 2


@dataclass(frozen=True)
class Limits:
    """The two measured limits of the roofline: memory bandwidth and FLOP/s."""

    read_bytes_per_s: float
    flops_per_s: float

    def seconds(self, flops: float, size_bytes: float) -> float:
        """The shortest possible time for this work: the larger of its compute and memory times."""
        return max(flops / self.flops_per_s, size_bytes / self.read_bytes_per_s)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the results of ``call`` are ready."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def captured(name: str, contender: Contender, device: torch.device, copies: int) -> tuple[Contender, int]:
    """The function to time for a contender, and the number of the contender's calls that it makes.

    On a GPU it is a CUDA graph with one call per weight, captured on the current stream, which must not be the default
    one. Without a graph, times at few tokens would measure the host's launches instead of the GPU. A contender that
    cannot be captured is timed with its launches, and stderr says so.
    """
    if device.type != "cuda":
        return contender, 1
    graph = torch.cuda.CUDAGraph()
    try:
        contender(0)  # the first call's initialization must not be captured
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            for i in range(copies):
                contender(i)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        reason = str(error).partition("\n")[0]
        print(f"{name} is timed with its launches, not as a CUDA graph: {reason}", file=sys.stderr)
        return contender, 1
    return lambda _: graph.replay(), copies


def alternate(
    contenders: Mapping[str, Contender], device: torch.device, copies: int, repeats: int, graphs: bool = True
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure for each of ``repeats`` rounds in which all contenders take turns.

    Each call uses the next of ``copies`` weights, so that no weight is still cached. Every second round runs the
    contenders in reverse order. On a GPU calls are replayed from CUDA graphs if ``graphs``.
    """

    def turn(contender: Contender, first: int, calls: int) -> float:
        def run() -> None:
            for i in range(first, first + calls):
                contender(i % copies)

        return seconds(run, device) / calls

    calls, callables, calls_in_one = {}, {}, {}
    for name, contender in contenders.items():
        call, calls_in_one[name] = captured(name, contender, device, copies) if graphs else (contender, 1)
        turn(call, 0, WARMUP_CALLS)
        calls[name] = max(1, math.ceil(ROUND_SECONDS / max(1e-7, turn(call, WARMUP_CALLS, WARMUP_CALLS))))
        callables[name] = call
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            seconds_of_one = turn(callables[name], number * calls[name], calls[name])
            times[name].append(seconds_of_one / calls_in_one[name])
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Median of the rounds' ratios, and their interquartile range relative to it."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (middle,) * 3
    return middle, (high - low) / middle


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """The rates that torch itself reaches with a sum over 1 GiB and with a product of two square matrices."""
    big = torch.ones(2**28, device=device)
    side = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    reads = alternate({"read": lambda _: big.sum()}, device, 1, 5)["read"]
    products = alternate({"product": lambda _: F.linear(a, b)}, device, 1, 5)["product"]
    return Limits(big.nbytes / min(reads), 2 * side**3 / min(products))  # a limit is the best of the rounds


def cache_bytes() -> int:
    """Bytes of the CPU's last-level cache, as the operating system reports it; 0 if it does not."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]] if text[-1:] in "KM" else int(text))
    return max(sizes, default=0)


def _cpu_description() -> dict[str, str]:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return {"cpu": fields.get("model name", platform.processor()), "cpu_mhz": fields.get("cpu MHz", "unknown")}


def _gpu_description(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    gpu = {"gpu": properties.name, "arch": f"sm_{properties.major}{properties.minor}"}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
        gpu["clocks"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return gpu


def describe(device: torch.device) -> dict[str, str]:
    """Facts about the machine that affect times: devices, clocks, threads, instruction sets."""
    from qlora import _C

    environment = {
        name: os.environ[name]
        for name in ("QLORA_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
        if name in os.environ
    }
    specific = _gpu_description(device) if device.type == "cuda" else {"isa": _C.active_isa()}
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        **_cpu_description(),
        **specific,
        **environment,
    }
