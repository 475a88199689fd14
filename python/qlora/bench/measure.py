"""Measures times of contenders in alternation, and the limits of the machine."""

import functools
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
# The product that measures the limit of FLOP/s: the largest one, or one that takes less time.
LARGEST_SIDE = {"cpu": 4096, "cuda": 8192}
PRODUCT_SECONDS = 0.5


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


class Watch:
    """Follows a measurement. This one does nothing, except that a contender's error ends the measurement."""

    def begin(self, contender: str, phase: str, calls: int) -> None:
        """The contender begins so many calls."""

    def measured(self, contender: str, seconds: float) -> None:
        """A figure: seconds per call."""

    def failed(self, contender: str, error: Exception) -> None:
        raise error

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def captured(name: str, contender: Contender, device: torch.device, copies: int, watch: Watch) -> tuple[Contender, int]:
    """The function to time for a contender, and the number of the contender's calls that it makes.

    On a GPU it is a CUDA graph with one call per weight, captured on the current stream, which must not be the default
    one. Without a graph, times at few tokens would measure the host's launches instead of the GPU. A contender that
    cannot be captured is timed with its launches, and a note says so.
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
        watch.note(f"{name} is timed with its launches, not as a CUDA graph: {reason}")
        return contender, 1
    return lambda _: graph.replay(), copies


class _Turns:
    """A contender's turns within its budget of seconds."""

    def __init__(self, name: str, contender: Contender, device: torch.device, copies: int, budget_s: float):
        self.name, self.device, self.copies, self.left_s = name, device, copies, budget_s
        self.call, self.calls_in_one = contender, 1
        self.calls, self.one_s = 1, 0.0  # calls in a turn; seconds of the last call

    def turn(self, first: int, calls: int) -> float:
        def run() -> None:
            for i in range(first, first + calls):
                self.call(i % self.copies)

        turn_s = seconds(run, self.device)
        self.left_s -= turn_s
        self.one_s = turn_s / calls
        return self.one_s / self.calls_in_one

    def warm_up(self, repeats: int, graphs: bool, watch: Watch) -> None:
        """Makes a few calls, fewer where too little time would be left for all rounds, and sets the calls of a turn."""
        watch.begin(self.name, "first call", 1)
        if graphs:
            self.call, self.calls_in_one = captured(self.name, self.call, self.device, self.copies, watch)
        self.turn(0, 1)
        if self.one_s <= self.left_s:
            watch.begin(self.name, "second call", 1)
            self.turn(1, 1)
        if (WARMUP_CALLS + repeats) * self.one_s <= self.left_s:
            watch.begin(self.name, "warm-up", WARMUP_CALLS)
            self.turn(WARMUP_CALLS, WARMUP_CALLS)
        self.calls = max(1, math.ceil(ROUND_SECONDS / max(1e-7, self.one_s)))

    @property
    def fits(self) -> bool:
        return self.calls * self.one_s <= self.left_s


def alternate(
    contenders: Mapping[str, Contender],
    device: torch.device,
    copies: int,
    repeats: int,
    graphs: bool = True,
    budget_s: float = math.inf,
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure for each of ``repeats`` rounds in which all contenders take turns.

    Each call uses the next of ``copies`` weights, so that no weight is still cached. Every second round runs the
    contenders in reverse order. On a GPU calls are replayed from CUDA graphs if ``graphs``. A contender begins no call
    that would presumably exceed ``budget_s`` seconds in all: a slow one has fewer rounds, or one figure, of its last
    call before them. One whose error ``watch`` takes has none.
    """
    watch = watch or Watch()
    times: dict[str, list[float]] = {}
    turns: dict[str, _Turns] = {}

    def attempt(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            times.pop(name, None)
            turns.pop(name, None)
            watch.failed(name, error)

    def record(name: str, figure: float) -> None:
        times.setdefault(name, []).append(figure)
        watch.measured(name, figure)

    for name, contender in contenders.items():
        turns[name] = _Turns(name, contender, device, copies, budget_s)
        attempt(name, functools.partial(turns[name].warm_up, repeats, graphs, watch))
    for name, of_name in list(turns.items()):
        if not of_name.fits:
            record(name, of_name.one_s / of_name.calls_in_one)
            del turns[name]

    def round_of(of_name: _Turns, number: int) -> None:
        watch.begin(of_name.name, f"round {number + 1} of {repeats}", of_name.calls)
        record(of_name.name, of_name.turn(number * of_name.calls, of_name.calls))

    for number in range(repeats):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            if turns[name].fits:
                attempt(name, functools.partial(round_of, turns[name], number))
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Median of the ratios of the rounds that both have, and their interquartile range relative to it (nan: of one)."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    middle = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (math.nan,) * 3
    return middle, (high - low) / middle


def _product_flops_per_s(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds_of_one = alternate({"product": lambda _: F.linear(a, b)}, device, 1, 5)["product"]
    return 2 * side**3 / min(seconds_of_one)  # a limit is the best of the rounds


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """The rates that torch itself reaches with a sum over 1 GiB and with a product of two square matrices."""
    big = torch.ones(2**28, device=device)
    reads = alternate({"read": lambda _: big.sum()}, device, 1, 5)["read"]
    side = 512
    flops_per_s = _product_flops_per_s(side, device, dtype)
    while side < LARGEST_SIDE[device.type] and 2 * (2 * side) ** 3 / flops_per_s < PRODUCT_SECONDS:
        side *= 2
        flops_per_s = _product_flops_per_s(side, device, dtype)
    return Limits(big.nbytes / min(reads), flops_per_s)


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

    names = "QLORA_CPU_ISA ONEDNN_MAX_CPU_ISA ATEN_CPU_CAPABILITY MKL_ENABLE_INSTRUCTIONS OMP_NUM_THREADS"
    environment = {name: os.environ[name] for name in names.split() if name in os.environ}
    specific = _gpu_description(device) if device.type == "cuda" else {"isa": _C.active_isa()}
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        **_cpu_description(),
        **specific,
        **environment,
    }
