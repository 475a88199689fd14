"""Tests `make gpu-check` with stand-ins for nvcc, the GPU's tools and the Python with CUDA."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[1] / "gpu/check.py"
ANSWER = '{"why": "", "arch": "90", "gpus": 1, "torch": "2.11.0+cu130"}'
STAND_INS = {
    # Writes the "driver" stand-in as its output.
    "nvcc": 'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done; cp "$(dirname "$0")/driver" "$out"',
    "driver": 'case "$1" in check) echo check passed;; peak) echo "read 4396 GB/s";; *) echo kernel,us;; esac',
    "nvidia-smi": 'echo "NVIDIA H200, 580.159.04, 345 MHz"',
    "compute-sanitizer": 'echo "========= ERROR SUMMARY: 0 errors"',
    "ncu": "echo sections",
    "python": f"case \"$*\" in *has_cuda_ops*) echo '{ANSWER}';; *pytest*) echo 662 passed in 18.02s;; esac",
}


@pytest.fixture
def tools(tmp_path):
    """A folder of stand-ins, of which a test can replace some."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    for name, script in STAND_INS.items():
        put(name, script)
    put.folder = folder
    return put


def check(tools, tmp_path, *arguments):
    result = subprocess.run(
        [sys.executable, CHECK, "--python", tools.folder / "python", "--results", tmp_path / "results", *arguments],
        env=os.environ | {"PATH": f"{tools.folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    summary = tmp_path / "results/summary.txt"
    return result, summary.read_text() if summary.exists() else ""


def test_every_step_has_a_log_and_a_line_of_the_summary(tools, tmp_path):
    result, summary = check(tools, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for name, words in {
        "check": "check passed",
        "operators": "662 passed",
        "runtime": "662 passed",
        "job": "662 passed",
        "racecheck": "0 errors",
        "peak": "4396 GB/s",
        "sweep": "",
        "beside-torch": "",
        "ncu-gemm_dx-64": "",
    }.items():
        line = next(line for line in summary.splitlines() if line.startswith(f"{name} "))
        assert words in line
        assert " ok " in line
        assert (tmp_path / f"results/{name}.log").exists()
    assert "NVIDIA H200" in summary
    assert "one GPU only" in summary
    assert summary.endswith("all passed\n")


def test_a_step_that_fails_or_hangs_costs_that_step(tools, tmp_path):
    tools("driver", 'case "$1" in check) echo FAIL gemm; exit 1;; one) kill -9 $$;; *) echo 605 TFLOP/s;; esac')
    tools("ncu", '"$(echo "$*" | grep -o "[^ ]*kernels")" one')
    result, summary = check(tools, tmp_path)
    assert result.returncode == 1
    assert "FAIL gemm" in summary
    assert "605 TFLOP/s" in summary
    failed = summary.splitlines()[-1]
    assert failed.startswith("failed: check, ")
    assert "ncu-gemv-1" in failed
    assert "operators" not in failed


def test_a_driver_that_does_not_compile_says_why(tools, tmp_path):
    tools("nvcc", 'echo "Error: no kernel image"; exit 2')
    result, summary = check(tools, tmp_path, "--only", "operators")
    assert result.returncode == 1
    assert "Error: no kernel image" in summary
    assert "662 passed" in summary  # the package is still checked
    assert "sweep" not in summary


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ('echo \'{"why": "torch sees no GPU", "arch": "", "gpus": 0, "torch": "2"}\'', "torch sees no GPU"),
        ("echo \"ModuleNotFoundError: No module named 'qlora'\" >&2; exit 1", "No module named 'qlora'"),
    ],
)
def test_a_machine_that_cannot_says_why(tools, tmp_path, python, words):
    tools("python", python)
    result, _ = check(tools, tmp_path)
    assert result.returncode == 1
    assert f"nothing was checked: {words}" in result.stdout or words in result.stdout


def test_tools_that_are_missing_are_named(tools, tmp_path):
    for name in ("compute-sanitizer", "ncu"):
        (tools.folder / name).unlink()
    _, summary = check(tools, tmp_path)
    assert "compute-sanitizer is not on PATH; ncu is not on PATH" in summary
    assert "memcheck" not in summary


def test_a_folder_of_something_else_is_not_deleted(tools, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/thesis.tex").write_text("years")
    result, _ = check(tools, tmp_path)
    assert result.returncode == 1
    assert (tmp_path / "results/thesis.tex").exists()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_driver_compiles(tmp_path):
    """Nothing else compiles it on a machine without a GPU, and the kernels' structs change."""
    root = CHECK.parents[2]
    flags = ["-std=c++17", "-O0", "--extended-lambda", "-w", "-arch=sm_80", f"-I{root / 'csrc'}"]
    command = ["nvcc", *flags, "-c", root / "benchmarks/cuda/kernels.cu", "-o", tmp_path / "kernels.o"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
