"""`make test-gpu`: everything that a machine with a GPU can check, and in the end what it could not.

    python tests/gpu/run.py [--sanitizer-only]

Runs in the Python that calls it: torch with CUDA, qlora built for it, and the [test] extra have to be installed there.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# One test of each operator and dtype, small enough for a sanitizer that runs a hundred times slower.
SANITIZED = "test_base or test_adapter_bias or test_all_gradients or test_forward_and_gradients or test_equals"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def why_not() -> str:
    import torch

    from qlora import _load

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not _load.has_cuda_ops():
        return "qlora was built without CUDA operators: pip install --no-build-isolation . with nvcc on PATH"
    return ""


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitizer-only", action="store_true")
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"nothing was checked: {reason}")
        return 1
    failed: list[str] = []
    unchecked: list[str] = []

    def run(name: str, command: list[str], **environment: str) -> None:
        print(f"== {name}: {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode != 0:
            failed.append(name)

    if not arguments.sanitizer_only:
        run("operators", pytest("tests/ops", "-k", "cuda"))
        run("graphs, streams, memory", pytest("tests/gpu", "-rs"))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        unchecked.append("compute-sanitizer is not on PATH: no memcheck, racecheck, initcheck, synccheck")
    else:
        for tool in SANITIZER_TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"]
            if tool != "initcheck":  # torch's own kernels are not ours to judge, but what they write has to be seen
                command += ["--kernel-name", "kernel_substring=qlora"]
            run(tool, command + pytest("tests/ops", "-k", f"cuda and ({SANITIZED})", "-x"),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
    import torch

    if torch.cuda.device_count() < 2:
        unchecked.append("one GPU only: that tensors of a second one are computed there")
    major, minor = torch.cuda.get_device_capability()
    unchecked.append(f"architectures other than this sm_{major}{minor}")
    print("\nnot checked here:\n" + "\n".join(f"- {line}" for line in unchecked))
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
