"""What the compiler makes of the CUDA kernels, for every architecture: registers, spills, and the instructions of SASS.

    python benchmarks/cuda_report.py [--archs 80 90] [--sass]      (make cuda-report)

Needs nvcc 12.8 or newer and no GPU; --sass also needs nvdisasm (pip install nvidia-cuda-nvdisasm). Exits with 1 if a
kernel spills registers, uses a stack, or holds so many registers that the blocks which its launch bounds promise do
not fit an SM.
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


def compile_cubin(source: Path, arch: int, folder: Path) -> tuple[Path, str]:
    cubin = folder / f"{source.stem}.sm_{arch}.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Wno-deprecated-gpu-targets", f"-I{ROOT / 'csrc'}"]
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", *flags, "-Xptxas", "-v", str(source), "-o", str(cubin)]
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


def launch_bounds(source: Path) -> tuple[int, int]:
    """Threads of a block, and blocks that an SM has to hold, as the source promises."""
    text = source.read_text()
    threads = re.search(r"kThreads = ([\d* ]*\d|32 \* kWarps)", text)
    warps = re.search(r"kWarps = (\d+)", text)
    count = 32 * int(warps.group(1)) if "kWarps" in threads.group(1) else int(threads.group(1))
    return count, max(int(n) for n in re.findall(r"QLORA_BOUNDS\(kThreads, (\d+)\)", text))


def sass_counts(cubin: Path) -> dict[str, collections.Counter]:
    """Static instructions of each kernel by class."""
    result = subprocess.run(["nvdisasm", "-c", str(cubin)], capture_output=True, text=True, check=True)
    kernels: dict[str, collections.Counter] = {}
    current: collections.Counter = collections.Counter()
    for line in result.stdout.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels.setdefault(found.group(1), collections.Counter())
        elif found := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            op = found.group(1)
            current["all"] += 1
            wide = ".128" if ".128" in op else ""
            family = op.split(".")[0]
            if family in {"HMMA", "LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "PRMT", "IMAD", "LEA", "FFMA"}:
                current[family + wide] += 1
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--sass", action="store_true", help="instructions of the first architecture's machine code")
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
        }
        for (source, arch), job in jobs.items():
            cubin, report = job.result()
            kernels = resources(report)
            threads, blocks = launch_bounds(source)
            for name, short in zip(kernels, demangle(list(kernels)), strict=True):
                use = kernels[name]
                table[source.stem, short][arch] = use["registers"]
                if use["spills"] or use["stack"]:
                    problems.append(f"sm_{arch} {short}: {use['spills']} bytes spilled, stack of {use['stack']} bytes")
                if use["registers"] * threads * blocks > REGISTERS_OF_AN_SM:
                    problems.append(
                        f"sm_{arch} {short}: {use['registers']} registers, {blocks} blocks do not fit an SM"
                    )
            if arguments.sass and arch == arguments.archs[0]:
                counts = sass_counts(cubin)
                for name, short in zip(counts, demangle(list(counts)), strict=True):
                    print(f"sass sm_{arch} {short}: " + ", ".join(f"{k} {v}" for k, v in counts[name].most_common()))
    print("| kernel | " + " | ".join(f"sm_{arch}" for arch in arguments.archs) + " |")
    print("| --- |" + " ---: |" * len(arguments.archs))
    for (_, short), registers in table.items():
        print(f"| {short} | " + " | ".join(str(registers[arch]) for arch in arguments.archs) + " |")
    print("\n".join(problems) if problems else "no spills, no stacks, every promise of launch bounds kept")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
