"""Print what `make` needs to build the CUDA operators for the local GPU: compiler packages and build variables.

    python cmake/cuda_tools.py --requirements    PyPI packages that contain nvcc; nothing if they are not needed
    python cmake/cuda_tools.py --environment     QLORA_CUDA=… QLORA_CUDA_ARCHS=…, for env(1)
    python cmake/cuda_tools.py --compiler        the packages of torch's CUDA release, GPU or not (wheels)

Run by the Python that has torch. A driver (nvidia-smi) and a torch with CUDA are needed for the first two; without them
nothing is printed, and the build is one for the CPU. Why is said on stderr.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Packages that nvcc from PyPI needs to compile and link; 150 MB together.
PACKAGES = tuple(f"nvidia-{name}" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl", "nvtx"))
OLDEST_NVCC = (12, 8)
OLDEST_ARCH = 75


def gpu_archs() -> list[int]:
    """Compute capabilities of the GPUs that the driver sees, 90 for 9.0, ascending."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return sorted({int(number.replace(".", "")) for number in re.findall(r"^\d+\.\d+$", result.stdout, re.MULTILINE)})


def torch_cuda() -> str | None:
    """The CUDA release that the installed torch was built for; torch itself is not imported."""
    root = Path(str(importlib.metadata.distribution("torch").locate_file("torch")))
    found = re.search(r"^cuda\b.*=\s*.([0-9.]+).\s*$", (root / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def nvcc_release() -> tuple[int, int] | None:
    """The release of the nvcc that a build would find without the PyPI packages."""
    # The same order as in cmake/FindCudaCompiler.cmake.
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc", shutil.which("nvcc")]
    candidates += [] if home else ["/usr/local/cuda/bin/nvcc"]
    for nvcc in candidates:
        if nvcc and Path(nvcc).exists():
            text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
            if found := re.search(r"release (\d+)\.(\d+)", text):
                return int(found[1]), int(found[2])
    return None


def main(wanted: str) -> int:
    cuda = torch_cuda()
    if wanted == "--compiler":
        if cuda is None or int(cuda.split(".")[0]) < 13:
            print(f"qlora: PyPI has nvcc for CUDA 13 and newer; this torch has {cuda or 'no CUDA'}", file=sys.stderr)
            return 1
        print(" ".join(f"{name}=={cuda}.*" for name in PACKAGES))
        return 0
    archs = gpu_archs()
    usable = [arch for arch in archs if arch >= OLDEST_ARCH]
    if not archs:
        return 0
    if cuda is None:
        print("qlora: there is a GPU, but this torch has no CUDA: building for the CPU", file=sys.stderr)
        return 0
    if not usable:
        print(f"qlora: GPUs of sm_{archs[-1]} are older than sm_{OLDEST_ARCH}: building for the CPU", file=sys.stderr)
        return 0
    major = int(cuda.split(".")[0])
    nvcc = nvcc_release()
    has_nvcc = nvcc is not None and nvcc >= OLDEST_NVCC and nvcc[0] == major
    if not has_nvcc and major < 13:
        print(
            f"qlora: torch was built for CUDA {cuda}, for which PyPI has no nvcc: install the CUDA toolkit"
            f" {major}.x, or a torch for CUDA 13. Building for the CPU",
            file=sys.stderr,
        )
        return 0
    if wanted == "--requirements":
        if not has_nvcc:
            print(" ".join(f"{name}=={cuda}.*" for name in PACKAGES))
    else:
        print(f"QLORA_CUDA=ON QLORA_CUDA_ARCHS={';'.join(map(str, usable))}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("--requirements", "--environment", "--compiler"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
