"""Reports the compiled CUDA kernels for every architecture: registers, spills, and the main loops in SASS.

    python tools/cuda_report.py [--archs 80 90] [--sass [LIBRARY.so KERNEL]]      (make cuda-report)

Needs nvcc 12.8 or newer but no GPU. --sass also needs nvdisasm and cuobjdump (pip install nvidia-cuda-nvdisasm
nvidia-cuda-cuobjdump). It counts the instructions in each kernel's main loop (see main_loops); with LIBRARY also in the
kernels of another library with SASS whose mangled names contain KERNEL. For each loop it prints the bytes that an SM's
warps request from memory in one iteration, and the number of instructions between a load and the first use of its
result; a single warp waits for the rest of the latency. Exits with 1 if a kernel spills registers, uses a stack or uses
too many registers for the blocks per SM that its launch bounds promise, or if ptxas serializes its wgmma.
"""

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = (75, 80, 86, 89, 90, 100, 120)
REGISTERS_OF_AN_SM = 65536
# These GPUs have too little shared memory for these tiles, so select.h never chooses them there.
SMALL_GPUS = (86, 89, 120)
LARGE_TILES = ("Shape<2, 2, 32, 3, 8, 64, 8>", "gemm_dx::Shape<2, 32, 8>")


def target(source: Path, arch: int) -> str:
    """The nvcc architecture of a source for ``arch``; empty if the source has no kernels for it."""
    if source.stem.endswith("_wgmma"):
        return "sm_90a" if arch == 90 else ""  # uses instructions that only Hopper has
    return f"sm_{arch}"


def compile_cubin(source: Path, arch: int, folder: Path) -> tuple[Path, str]:
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Wno-deprecated-gpu-targets", f"-I{ROOT / 'csrc'}"]
    command = [
        "nvcc",
        "-cubin",
        f"-arch={target(source, arch)}",
        *flags,
        "-Xptxas",
        "-v",
        str(source),
        "-o",
        str(cubin),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")
    return cubin, result.stderr


def resources(report: str) -> dict[str, dict[str, int]]:
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    patterns = {"stack": r"(\d+) bytes stack frame", "spills": r"(\d+) bytes spill stores", "registers": r"Used (\d+)"}
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found.group(1)
            kernels[name] = {}
        for key, pattern in patterns.items():
            if name and (found := re.search(pattern, line)):
                kernels[name][key] = int(found.group(1))
    return kernels


def demangle(names: list[str]) -> list[str]:
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = [re.sub(r"qlora::(cuda::)?", "", line) for line in result.stdout.splitlines()]
    return [re.sub(r"\((?!\w+\)\d).*\)$", "", line).removeprefix("void ") for line in short]


def launch_bounds(source: Path, folder: Path) -> dict[str, tuple[int, int]]:
    """(threads per block, minimum blocks per SM) of each kernel, from its launch bounds."""
    arch, ptx = "sm_90a" if source.stem.endswith("_wgmma") else "sm_80", folder / f"{source.stem}.ptx"
    command = ["nvcc", "-ptx", f"-arch={arch}", "-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(ptx)]
    subprocess.run(command, capture_output=True, check=True)
    bounds: dict[str, list[int]] = {}
    for line in ptx.read_text().splitlines():
        if found := re.search(r"\.entry (\w+)", line):
            name = found.group(1)
        elif found := re.match(r"\.(?:maxntid|minnctapersm) (\d+)", line):
            bounds.setdefault(name, []).append(int(found.group(1)))
    return {name: (threads, blocks) for name, (threads, blocks) in bounds.items()}


FAMILIES = (
    "HMMA",
    "HGMMA",
    "LDS",
    "LDSM",
    "STS",
    "LDG",
    "STG",
    "LDGSTS",
    "LDL",
    "STL",
    "PRMT",
    "IMAD",
    "LOP3",
    "FFMA",
    "BAR",
)


def tool(name: str) -> str:
    """The path of nvdisasm or cuobjdump: on PATH, or from the PyPI package in this Python."""
    if found := shutil.which(name):
        return found
    for folder in map(Path, sys.path):
        for path in folder.glob(f"nvidia/cu*/bin/{name}"):
            path.chmod(0o755)
            return str(path)
    sys.exit(f"{name} was not found: pip install nvidia-cuda-{name}")


Instruction = tuple[str, str]  # opcode, operands


def main_loops(cubin: Path) -> dict[str, list[Instruction]]:
    """The main loop of each kernel: the shortest loop with at least half of the mma instructions of any loop."""
    result = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    loops: dict[str, list[list[Instruction]]] = {}  # loop bodies, by kernel
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in result.stdout.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            code, labels = [], {}
            bodies = loops.setdefault(found.group(1), [])
        elif found := re.match(r"(\.L_x_\d+):", line):
            labels[found.group(1)] = len(code)
        elif found := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", line):
            code.append((found.group(1), found.group(2)))
            destination = re.search(r"\.L_x_\d+", found.group(2)) if found.group(1).startswith("BRA") else None
            if destination is not None and destination.group(0) in labels:
                bodies.append(code[labels[destination.group(0)] :])
    return {name: main for name, bodies in loops.items() if (main := main_loop(bodies))}


def products(body: list[Instruction]) -> int:
    """Number of tensor-core instructions: of Hopper's wgmma if there are any, else of mma."""
    asynchronous = sum(op.startswith("HGMMA") for op, _ in body)
    return asynchronous or sum(op.startswith("HMMA") for op, _ in body)


def main_loop(bodies: list[list[Instruction]]) -> list[Instruction] | None:
    if with_wgmma := [body for body in bodies if any(op.startswith("HGMMA") for op, _ in body)]:
        bodies = with_wgmma
    most = max(map(products, bodies), default=0)
    return min((body for body in bodies if products(body) >= most / 2), key=len) if most else None


def count_families(body: list[Instruction]) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    for op, _ in body:
        family = op.split(".")[0]
        if family in FAMILIES:
            counts[family + (".128" if ".128" in op else "")] += 1
    return counts


def access_bytes(op: str) -> int:
    """Bytes that a memory instruction accesses per lane."""
    sizes = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((sizes[part] for part in op.split(".")[1:] if part in sizes), 4)


def distances_to_use(body: list[Instruction]) -> list[int]:
    """Instructions between each load from memory and the first use of its result, across iterations of the loop."""
    distances = []
    for at, (op, operands) in enumerate(body):
        first = re.match(r"\s*R(\d+)", operands) if op.startswith("LDG.") else None
        if first is None:
            continue
        loaded = {f"R{int(first.group(1)) + i}" for i in range(max(1, access_bytes(op) // 4))}
        for step in range(1, len(body)):
            other, text = body[(at + step) % len(body)]
            sources = text if other.startswith(("ST", "RED", "ATOM")) else text.partition(",")[2]
            if loaded & set(re.findall(r"\bR\d+\b", sources)):
                distances.append(step)
                break
    return distances


def print_loops(title: str, cubin: Path, bounds: dict[str, tuple[int, int]], only: str = "") -> None:
    loops = {name: body for name, body in main_loops(cubin).items() if only in name}
    for short, (name, body) in zip(demangle(list(loops)), loops.items(), strict=True):
        mma = products(body)
        rest = ", ".join(f"{k} {v}" for k, v in count_families(body).most_common() if "MMA" not in k)
        text = f"{title} {short}: {len(body) / mma:.2f} per mma ({len(body)} / {mma}); {rest}"
        asked = 32 * sum(access_bytes(op) for op, _ in body if op.startswith("LDG"))  # includes LDGSTS
        if name in bounds and asked:
            threads, blocks = bounds[name]
            text += f"; {asked * threads // 32 * blocks / 1024:.1f} KiB requested per SM and iteration"
        if distances := distances_to_use(body):
            text += f"; loads are used {min(distances)} to {max(distances)} instructions later"
        print(text)


def print_loops_of_library(library: Path, arch: int, kernel: str, folder: Path) -> None:
    subprocess.run([tool("cuobjdump"), "-xelf", f"sm_{arch}", str(library.resolve())], cwd=folder, check=True,
                   capture_output=True)  # fmt: skip
    for cubin in sorted(folder.glob(f"*sm_{arch}*.cubin")):
        if kernel.encode() in cubin.read_bytes():
            print_loops(f"{library.name} sm_{arch}", cubin, {}, kernel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--sass", nargs="*", metavar="LIBRARY KERNEL", help="count main loops, also of a library")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on PATH: install the CUDA toolkit 12.8 or newer")
    problems = []
    table: dict[tuple[str, str], dict[int, int]] = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {
            (source, arch): pool.submit(compile_cubin, source, arch, Path(folder))
            for source in SOURCES
            for arch in arguments.archs
            if target(source, arch)
        }
        bounds_of = {source: pool.submit(launch_bounds, source, Path(folder)) for source in SOURCES}
        for (source, arch), job in jobs.items():
            cubin, report = job.result()
            kernels, bounds = resources(report), bounds_of[source].result()
            if "serialized" in report:
                problems.append(f"sm_{arch} {source.stem}: ptxas serializes wgmma: see its (C75..) warning")
            for name, short in zip(kernels, demangle(list(kernels)), strict=True):
                use, (threads, blocks) = kernels[name], bounds[name]
                table[source.stem, short][arch] = use["registers"]
                is_launched = arch not in SMALL_GPUS or not any(tile in short for tile in LARGE_TILES)
                if is_launched and (use["spills"] or use["stack"]):
                    problems.append(f"sm_{arch} {short}: {use['spills']} bytes spilled, stack of {use['stack']} bytes")
                if use["registers"] * threads * blocks > REGISTERS_OF_AN_SM:
                    problems.append(
                        f"sm_{arch} {short}: {use['registers']} registers, {blocks} blocks do not fit an SM"
                    )
            if arguments.sass is not None:
                print_loops(f"sm_{arch}", cubin, bounds)
        if arguments.sass:
            library, kernel = arguments.sass
            for arch in arguments.archs:
                others = Path(folder) / f"others_{arch}"
                others.mkdir()
                print_loops_of_library(Path(library), arch, kernel, others)
    print("| kernel | " + " | ".join(f"sm_{arch}" for arch in arguments.archs) + " |")
    print("| --- |" + " ---: |" * len(arguments.archs))
    for (_, short), registers in table.items():
        print(f"| {short} | " + " | ".join(str(registers.get(arch, "–")) for arch in arguments.archs) + " |")
    print("\n".join(problems) if problems else "no spills or stacks; all launch bounds are met")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
