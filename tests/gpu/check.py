"""`make gpu-check`: runs all checks and timings that need an NVIDIA GPU, with a log for each step and a summary.

    python tests/gpu/check.py [--results FOLDER] [--only STEP …]

It uses the Python that runs it (or --python), which needs torch with CUDA, qlora built for it, and the extras [train]
and [test]; nvcc must be on PATH. It takes about 5 minutes on 16 cores. Checks run in parallel, timings run alone. If a
step hangs or crashes, the other steps still run.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TELLING = re.compile(r"passed|failed|FAIL|ERROR SUMMARY|RACECHECK SUMMARY|STICKY|GB/s|TFLOP/s|Error")
PROFILED = (
    ("gemv", 0, 1),
    ("gemv", 0, 16),
    ("gemm", 0, 64),
    ("gemm", 0, 512),
    ("gemm_dx", 0, 64),
    ("dequantize", 1, 0),
)
QUESTIONS = """
import json, torch
from qlora import _load
if torch.version.cuda is None: why = f"torch {torch.__version__} has no CUDA"
elif not torch.cuda.is_available(): why = "torch sees no GPU"
elif not _load.has_cuda_ops(): why = "qlora was built without CUDA operators: pip install . with nvcc on PATH"
else: why = ""
arch = "" if why else "%d%d" % torch.cuda.get_device_capability()
print(json.dumps({"why": why, "arch": arch, "gpus": torch.cuda.device_count(), "torch": torch.__version__}))
"""


@dataclass(frozen=True)
class Step:
    """A command and its time limit."""

    name: str
    command: Sequence[str]
    seconds: int


@dataclass(frozen=True)
class Outcome:
    step: Step
    code: int  # exit status; 124: over its time limit
    seconds: float
    line: str  # the last line of its log that matches TELLING

    @property
    def passed(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        state = "ok" if self.passed else "too long" if self.code == 124 else f"failed ({self.code})"
        return f"{self.step.name:24} {state:12} {self.seconds:6.0f} s  {self.line}"


def run(step: Step, results: Path) -> Outcome:
    start = time.monotonic()
    log = results / f"{step.name}.log"
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(python_path())}
    with log.open("w") as file:
        file.write(f"$ {' '.join(step.command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also its children: the next step may be a timing
            process.wait()
            code = 124
        except OSError as error:
            file.write(f"Error: {error}\n")
            code = 127
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[1:] if TELLING.search(line)]
    return Outcome(step, code, time.monotonic() - start, lines[-1][:100] if lines else "")


def python_path() -> list[str]:
    return [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]


def gencode(source: Path, arch: str) -> str:
    """The gencode flag of a source. Hopper's wgmma needs sm_90a; on other GPUs its kernels are never launched."""
    return "-arch=sm_90a" if arch == "90" and source.stem.endswith("_wgmma") else f"-arch=sm_{arch}"


def build_driver(arch: str, results: Path) -> Outcome:
    """Compiles the kernels and benchmarks/cuda/kernels.cu for this GPU only, one nvcc process per core."""
    start = time.monotonic()
    objects = results / "objects"
    objects.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-lineinfo", f"-I{ROOT / 'csrc'}", f"-DQLORA_NEWEST_ARCH={arch}"]
    if arch == "90":
        flags.append("-DQLORA_HAS_WGMMA")
    sources = [
        *sorted((ROOT / "csrc/cuda").glob("*.cu")),
        ROOT / "csrc/cuda/gpu_info.cpp",
        ROOT / "benchmarks/cuda/kernels.cu",
    ]
    compile_flags = ["-O3", "-fmad=false", "--extended-lambda", "-w", "-c"]
    steps = [
        Step(
            f"build-{path.stem}",
            ["nvcc", gencode(path, arch), *flags, *compile_flags, str(path), "-o", str(objects / f"{path.stem}.o")],
            600,
        )
        for path in sources
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda step: run(step, results), steps))
    link = ["nvcc", f"-arch=sm_{arch}", "-cudart", "static", *(str(objects / f"{p.stem}.o") for p in sources)]
    step = Step("build", [*link, "-o", str(results / "kernels")], 120)
    outcomes += [run(step, results)]
    shutil.rmtree(objects)
    code = next((outcome.code for outcome in outcomes if not outcome.passed), 0)
    for outcome in outcomes[:-1]:
        if outcome.passed:
            (results / f"{outcome.step.name}.log").unlink()
    return Outcome(step, code, time.monotonic() - start, next((o.line for o in outcomes if not o.passed), ""))


def checks(python: str, driver: str) -> list[list[Step]]:
    """Chains of steps: chains run in parallel, the steps of a chain in sequence."""

    def pytest(name: str, seconds: int, *arguments: str) -> Step:
        guard = ["-p", "poison", "-p", "no:cacheprovider", "--timeout", "60", "--timeout-method", "thread", "-rfEs"]
        return Step(name, [python, "-m", "pytest", *guard, "--tb", "short", *arguments], seconds)

    spread = ["-n", "8", "--max-worker-restart", "30"] if has_xdist(python) else []
    chains = [
        [pytest("operators", 600, "tests/ops", "-k", "cuda", *spread)],
        [pytest("runtime", 120, "tests/gpu/test_runtime.py"), pytest("job", 300, "tests/gpu/test_job.py")],
    ]
    # Only a part of the suite runs under a sanitizer, because all of it takes 40 minutes.
    if shutil.which("compute-sanitizer"):
        tools = ("memcheck", "initcheck", "synccheck", "racecheck")
        command = ["compute-sanitizer", "--error-exitcode", "99", "--tool"]
        chains.append([Step(tool, [*command, tool, driver, "check", "small"], 200) for tool in tools])
    return chains


def has_xdist(python: str) -> bool:
    return subprocess.run([python, "-c", "import xdist"], capture_output=True, check=False).returncode == 0


def timings(python: str, driver: str) -> list[Step]:
    steps = [
        Step("peak", [driver, "peak"], 60),
        Step("sweep", [driver, "sweep"], 300),
        Step("beside-torch", [python, "benchmarks/gpu.py"], 400),
    ]
    if shutil.which("ncu"):
        sections = ["--clock-control", "none", "--set", "full", "--import-source", "no", "--page", "details"]
        launch = ["--kernel-name-base", "demangled", "--launch-skip", "1", "--launch-count", "1"]
        for kernel, tile, m in PROFILED:
            name = ["--kernel-name", f"regex:{kernel}(_wgmma)?::kernel"]
            one = [driver, "one", kernel, str(tile), str(m), "4096", "4096", "3"]
            steps.append(Step(f"ncu-{kernel}-{m}", ["ncu", *sections, *launch, *name, *one], 60))
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "build/gpu-check", help="folder for the logs")
    parser.add_argument("--python", default=sys.executable, help="Python with torch and qlora")
    parser.add_argument("--only", nargs="*", default=[], help="names of steps, e.g. check operators sweep")
    arguments = parser.parse_args()
    answer = subprocess.run([arguments.python, "-c", QUESTIONS], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        print(f"nothing was checked: {answer.stderr.strip().splitlines()[-1]}")
        return 1
    here = json.loads(answer.stdout)
    if here["why"]:
        print(f"nothing was checked: {here['why']}")
        return 1
    results = arguments.results.absolute()
    if results.exists() and any(results.iterdir()) and not (results / "card.log").exists():
        print(f"nothing was checked: {results} exists and contains something else: choose another --results")
        return 1
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    outcomes: list[Outcome] = []

    def done(outcome: Outcome) -> Outcome:
        outcomes.append(outcome)
        print(outcome, flush=True)
        return outcome

    def wanted(steps: Sequence[Step]) -> list[Step]:
        return [step for step in steps if not arguments.only or step.name in arguments.only]

    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
    card = Step("card", ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 30)
    done(run(card, results))
    driver = str(results / "kernels")
    if done(build_driver(here["arch"], results)).passed:
        for step in wanted([Step("check", [driver, "check"], 120)]):
            done(run(step, results))
    chains = checks(arguments.python, driver)
    with ThreadPoolExecutor(len(chains)) as pool:
        list(pool.map(lambda chain: [done(run(step, results)) for step in wanted(chain)], chains))
    for step in wanted(timings(arguments.python, driver)):
        done(run(step, results))
    done(run(Step("card-after", card.command, 30), results))

    unchecked = [f"architectures other than sm_{here['arch']}"]
    if here["gpus"] < 2:
        unchecked.append("one GPU only: computation on a second GPU")
    unchecked += [f"{tool} is not on PATH" for tool in ("compute-sanitizer", "ncu") if shutil.which(tool) is None]
    failed = [outcome.step.name for outcome in outcomes if not outcome.passed]
    summary = [
        f"torch {here['torch']}: {(results / 'card.log').read_text().splitlines()[-1]}",
        *map(str, outcomes),
        "not checked here: " + "; ".join(unchecked),
        "failed: " + ", ".join(failed) if failed else "all passed",
    ]
    (results / "summary.txt").write_text("\n".join(summary) + "\n")
    print("\n".join(summary[-2:]), f"\nlogs: {results}", sep="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
