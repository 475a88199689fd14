"""What the compiler makes of the CUDA kernels, for every architecture: registers, spills, and the main loops in SASS.

    python benchmarks/cuda_report.py [--archs 80 90] [--sass [LIBRARY.so KERNEL]]      (make cuda-report)

Needs nvcc 12.8 or newer and no GPU. --sass also needs nvdisasm and cuobjdump (pip install nvidia-cuda-nvdisasm
nvidia-cuda-cuobjdump); it counts the loop with the most mma instructions of each kernel, and, of a library of others
that contains SASS, of the kernels whose mangled names contain KERNEL. Exits with 1 if a kernel spills registers, uses a
stack, or holds so many registers that the blocks which its launch bounds promise do not fit an SM.
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
# ptxas schedules the 128 x 128 tile of gemm for sm_90 into 52 bytes of spills, 14 of the 780 instructions of its loop;
# other forms of the same source spill on other architectures instead (docs/kernels.md).
TOLERATED_SPILLS = {(90, "gemm", True): 52}


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


FAMILIES = ("HMMA", "LDS", "LDSM", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL", "PRMT", "IMAD", "LOP3", "FFMA", "BAR")


def tool(name: str) -> str:
    """nvdisasm or cuobjdump: on PATH, or from PyPI beside this Python."""
    if found := shutil.which(name):
        return found
    for folder in map(Path, sys.path):
        for path in folder.glob(f"nvidia/cu*/bin/{name}"):
            path.chmod(0o755)
            return str(path)
    sys.exit(f"{name} was not found: pip install nvidia-cuda-{name}")


def main_loops(cubin: Path) -> dict[str, collections.Counter]:
    """Instructions by class in the main loop of each kernel: the shortest one that has half of the mma of any loop."""
    result = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    loops: dict[str, list[list[str]]] = {}  # bodies, by kernel
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in result.stdout.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            code, labels = [], {}
            bodies = loops.setdefault(found.group(1), [])
        elif found := re.match(r"(\.L_x_\d+):", line):
            labels[found.group(1)] = len(code)
        elif found := re.search(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", line):
            code.append(found.group(1))
            target = re.search(r"\.L_x_\d+", found.group(2)) if found.group(1).startswith("BRA") else None
            if target is not None and target.group(0) in labels:
                bodies.append(code[labels[target.group(0)] :])
    return {name: main for name, bodies in loops.items() if (main := main_loop([count_families(b) for b in bodies]))}


def main_loop(loops: list[collections.Counter]) -> collections.Counter | None:
    most = max((loop["HMMA"] for loop in loops), default=0)
    return min((loop for loop in loops if loop["HMMA"] >= most / 2), key=lambda loop: loop["all"]) if most else None


def count_families(body: list[str]) -> collections.Counter:
    counts = collections.Counter({"all": len(body)})
    for op in body:
        family = op.split(".")[0]
        if family in FAMILIES:
            counts[family + (".128" if ".128" in op else "")] += 1
    return counts


def print_loops(title: str, cubin: Path, only: str = "") -> None:
    loops = {name: counts for name, counts in main_loops(cubin).items() if only in name}
    for short, counts in zip(demangle(list(loops)), loops.values(), strict=True):
        rest = ", ".join(f"{k} {v}" for k, v in counts.most_common() if k not in {"all", "HMMA"})
        print(
            f"{title} {short}: {counts['all'] / counts['HMMA']:.2f} a mma ({counts['all']} / {counts['HMMA']}); {rest}"
        )


def print_loops_of_library(library: Path, arch: int, kernel: str, folder: Path) -> None:
    subprocess.run([tool("cuobjdump"), "-xelf", f"sm_{arch}", str(library.resolve())], cwd=folder, check=True,
                   capture_output=True)  # fmt: skip
    for cubin in sorted(folder.glob(f"*sm_{arch}*.cubin")):
        if kernel.encode() in cubin.read_bytes():
            print_loops(f"{library.name} sm_{arch}", cubin, kernel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--sass", nargs="*", metavar="LIBRARY KERNEL", help="count main loops, of a library too")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on PATH: install the CUDA toolkit 12.8 or newer")
    problems, known = [], []
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
                    tolerated = TOLERATED_SPILLS.get((arch, source.stem, "2, 128" in short), 0)
                    spill = f"sm_{arch} {short}: {use['spills']} bytes spilled, stack of {use['stack']} bytes"
                    (problems if use["spills"] > tolerated else known).append(spill)
                if use["registers"] * threads * blocks > REGISTERS_OF_AN_SM:
                    problems.append(
                        f"sm_{arch} {short}: {use['registers']} registers, {blocks} blocks do not fit an SM"
                    )
            if arguments.sass is not None:
                print_loops(f"sm_{arch}", cubin)
        if arguments.sass:
            library, kernel = arguments.sass
            for arch in arguments.archs:
                others = Path(folder) / f"others_{arch}"
                others.mkdir()
                print_loops_of_library(Path(library), arch, kernel, others)
    print("| kernel | " + " | ".join(f"sm_{arch}" for arch in arguments.archs) + " |")
    print("| --- |" + " ---: |" * len(arguments.archs))
    for (_, short), registers in table.items():
        print(f"| {short} | " + " | ".join(str(registers[arch]) for arch in arguments.archs) + " |")
    for line in known:
        print(f"tolerated: {line}")
    print("\n".join(problems) if problems else "no other spills or stacks, every promise of launch bounds kept")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
