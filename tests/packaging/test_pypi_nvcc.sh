# What `make` does on a machine with an NVIDIA driver and no CUDA toolkit: nvcc from PyPI builds the operators for the GPU
# at hand. The driver is played by a script, every other nvcc is hidden, and $CUDA_TORCH, without what it depends on, is
# enough to build against. Then the library has to hold machine code for that GPU.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
hidden=$( (which -a nvcc || true; ls -d /usr/local/cuda*/bin 2> /dev/null || true) | sed 's,/nvcc$,,' | sort -u | tr '\n' ';')
mkdir "$work/bin"
printf '#!/bin/sh\necho 8.0\n' > "$work/bin/nvidia-smi"
chmod +x "$work/bin/nvidia-smi"
# A PATH in which no folder but ours comes before the system's, and none of them has an nvcc.
for tool in "$PYTHON" cc c++ gcc g++ make; do ln -s "$(command -v "$tool")" "$work/bin/$(basename "$tool")"; done
unset CUDACXX CUDA_PATH
export CUDA_HOME="$work/no-toolkit"
export PATH="$work/bin:/usr/bin:/bin"
if command -v nvcc; then echo "an nvcc is left on PATH"; exit 1; fi

"$work/bin/$(basename "$PYTHON")" -m venv "$work/venv"
python="$work/venv/bin/python"
pip="$python -m pip install --quiet --disable-pip-version-check"
$pip --no-deps "$CUDA_TORCH"
$pip "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
# shellcheck disable=SC2046
$pip --no-deps $("$python" cmake/cuda_tools.py --requirements | grep nvidia-cuda-nvcc)
environment=$("$python" cmake/cuda_tools.py --environment)
echo "building with $environment and $("$work"/venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc --version | tail -2 | head -1)"
env $environment CMAKE_ARGS="-DCMAKE_IGNORE_PATH=$hidden" \
  "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" .
"$python" -m zipfile -e "$work"/fused_qlora-*.whl "$work/wheel"
grep -q "sm_80" "$work/wheel/qlora/libqlora_cuda.so" || { echo "no machine code for sm_80 in libqlora_cuda.so"; exit 1; }
if grep -q "sm_90" "$work/wheel/qlora/libqlora_cuda.so"; then echo "built for more than the GPU at hand"; exit 1; fi
"$python" - "$work/wheel/qlora" <<'CODE'
import importlib.util, pathlib, sys
path = next(pathlib.Path(sys.argv[1]).glob("_C*.so"))
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.CUDA_ARCHS == (80,), module.CUDA_ARCHS
CODE
echo "1 passed, 0 failed"
