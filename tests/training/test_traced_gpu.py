"""Runs tests/training/traced_gpu.py in a separate process, because its stand-in for a GPU affects the whole process."""

import subprocess
import sys
from pathlib import Path


def test_the_job_traced_on_a_gpu_that_is_not_there():
    file = Path(__file__).with_name("traced_gpu.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parents[2])
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
