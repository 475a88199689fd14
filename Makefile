# Everything a newcomer types. Each target makes what it needs in .venv and can be run twice.
#   make demo   fine-tune a real language model in 4 bit     make test       all tests
#   make bench  measure against torch                        make lint       style and types
#   make test-abi  one wheel under several torch releases    make test-asan  C++ and CUDA tests under the sanitizers
#   make docs   the documentation as a site in build/site
#   make ptx    PTX of every CUDA kernel                     make cuda-report  their registers for every GPU (nvcc)
#   make gpu-check  where there is one (see tests/gpu/check.py)  make test-simt-full  every schedule and architecture
#   make test-aarch64  C++ tests of the kernels for 64-bit ARM, cross-compiled and run by qemu
#   make wheels  manylinux_2_28 wheels in dist/cpu           make wheels-cuda  the same for CPUs and GPUs, in dist/cuda

PYTHON ?= python3
VENV ?= .venv
# The package declares a range; this file pins what it installs, so that a run can be repeated. TORCH_INDEX may name a
# package index with CPU builds, e.g. the one that pytorch.org gives for your system.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ABI_TORCHES ?= torch==2.11.0 torch==2.14.1
CUDA_TORCH ?= torch==2.14.1
# One wheel for each: the bindings use pybind11, which has no stable ABI of Python.
WHEEL_PYTHONS ?= $(PYTHON)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := $(shell find csrc cmake python -type f -not -name '*.pyc' 2>/dev/null) CMakeLists.txt pyproject.toml
say = @printf '\033[1m== %s\033[0m\n' "$(1)"

DOCS_VENV ?= build/docs-venv
.PHONY: docs demo test test-cpp test-asan test-aarch64 test-abi test-pypi-nvcc test-simt-full gpu-check lint format bench \
  wheels wheels-cuda ptx cuda-report clean

demo: $(VENV)/.installed
	$(call say,Fine-tuning SmolLM2-135M in 4 bit)
	$(BIN)/qlora demo

# Up to four processes divide the files of tests. Their threads sleep while they wait, because processes share cores.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# QLORA_SIMT_LIBRARY makes the tests fail, not skip, where the CUDA kernels on the CPU are missing.
test: $(VENV)/.installed $(VENV)/.test-tools test-cpp
	$(call say,Python tests)
	QLORA_SIMT_LIBRARY=$(abspath build/tests/tests/simt/libqlora_simt.so) $(PYTEST)

CMAKE_TESTS = $(BIN)/cmake -S . -G Ninja -DQLORA_BUILD_TESTS=ON -DQLORA_BUILD_SIMT=ON \
  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python)

test-cpp: $(VENV)/.build-tools
	$(call say,C++ tests of the kernels; the CUDA kernels on the CPU)
	$(CMAKE_TESTS) -B build/tests > /dev/null
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure

# libasan has to come before everything else in the process, so Python gets it preloaded.
test-asan: $(VENV)/.installed $(VENV)/.test-tools
	$(call say,C++ tests and CUDA kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer)
	$(CMAKE_TESTS) -B build/asan -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" > /dev/null
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 QLORA_SIMT_LIBRARY=$(abspath build/asan/tests/simt/libqlora_simt.so) \
	  $(PYTEST) tests/ops -k simt

# The tools are two packages of Debian and Ubuntu; a machine without them skips the target.
test-aarch64: $(VENV)/.build-tools
	$(call say,C++ tests of the kernels for aarch64 under qemu)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64-static; do command -v $$tool > /dev/null || { \
	  echo "skipped: $$tool is missing (apt install g++-aarch64-linux-gnu qemu-user-static)"; exit 0; }; done; \
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DQLORA_BUILD_TESTS=ON \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) > /dev/null && \
	$(BIN)/cmake --build build/aarch64 && \
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure

# In your own Python, where torch has CUDA and qlora is installed: the one of .venv has no CUDA.
gpu-check:
	$(call say,Checks and times on a GPU with $(PYTHON))
	$(PYTHON) tests/gpu/check.py

test-simt-full: $(VENV)/.installed $(VENV)/.test-tools test-cpp
	$(call say,The CUDA kernels without a GPU: every test on every architecture with several schedules)
	QLORA_TEST_FULL=1 QLORA_SIMT_LIBRARY=$(abspath build/tests/tests/simt/libqlora_simt.so) \
	  $(PYTEST) tests/simt tests/ops tests/ptx -k "simt or sm_ or test_every_kernel"

bench: $(VENV)/.installed
	$(call say,Benchmark: the 4-bit operators beside torch)
	$(BIN)/qlora bench --json build/bench.json --png build/bench.png

lint: $(VENV)/.lint-tools
	$(call say,ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call say,clang-format)
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(call say,mypy)
	$(BIN)/mypy

format: $(VENV)/.lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

test-abi: $(VENV)/.build-tools
	$(call say,One wheel under $(TORCH) $(ABI_TORCHES))
	PYTHON=$(BIN)/python ABI_TORCHES="$(ABI_TORCHES)" sh tests/packaging/test_abi.sh

test-pypi-nvcc:
	$(call say,The build with nvcc from PyPI)
	PYTHON=$(PYTHON) CUDA_TORCH="$(CUDA_TORCH)" sh tests/packaging/test_pypi_nvcc.sh

wheels:
	$(call say,manylinux wheels for the CPU: $(WHEEL_PYTHONS))
	$(call build_wheels,cpu)

wheels-cuda:
	$(call say,manylinux wheels for CPU and GPUs: $(WHEEL_PYTHONS))
	$(call build_wheels,cuda)

build_wheels = @for python in $(WHEEL_PYTHONS); do PYTHON=$$python TORCH="$(TORCH)" CUDA_TORCH="$(CUDA_TORCH)" \
  TORCH_INDEX="$(TORCH_INDEX)" sh tools/build_wheels.sh $(1) || exit 1; done

ptx:
	$(call say,PTX of the CUDA kernels in build/ptx)
	for arch in sm_75 sm_80 sm_90; do mkdir -p build/ptx/$$arch && for kernel in csrc/cuda/*.cu; do \
	  nvcc -ptx -arch=$$arch -std=c++17 -O3 -fmad=false -lineinfo -Wno-deprecated-gpu-targets -Icsrc $$kernel \
	    -o build/ptx/$$arch/$$(basename $$kernel .cu).ptx || exit 1; done; done

cuda-report:
	$(call say,What nvcc makes of the CUDA kernels for every architecture)
	$(PYTHON) tools/cuda_report.py

# In an environment of its own: the site's tools read the sources and import nothing of them.
docs: $(DOCS_VENV)/.installed
	$(call say,The documentation as a site in build/site)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

$(DOCS_VENV)/.installed: pyproject.toml
	$(call say,Installing the tools of the documentation)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')
	@touch $@

clean:
	rm -rf $(VENV) build

$(BIN)/python:
	$(call say,Making $(VENV))
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

$(VENV)/.torch: | $(BIN)/python
	$(call say,Installing $(TORCH))
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.build-tools: pyproject.toml $(VENV)/.torch
	$(call say,Installing build tools)
	$(PIP) "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.24" ninja
	@touch $@

# With an NVIDIA driver and a torch for CUDA the operators for the GPU at hand are built too, by nvcc from PyPI where
# there is no toolkit. Elsewhere cuda_tools.py prints nothing.
CUDA_TOOLS = $(BIN)/python cmake/cuda_tools.py

$(VENV)/.cuda-tools: cmake/cuda_tools.py $(VENV)/.torch
	@packages="$$($(CUDA_TOOLS) --requirements)"; if [ -n "$$packages" ]; then \
	  printf '\033[1m== Installing nvcc for the GPU at hand\033[0m\n'; $(PIP) $$packages || exit 1; fi
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.build-tools $(VENV)/.cuda-tools
	$(call say,Building and installing qlora)
	env $$($(CUDA_TOOLS) --environment 2> /dev/null) $(PIP) --no-build-isolation ".[train]" $(TORCH)
	@touch $@

$(VENV)/.test-tools: pyproject.toml $(VENV)/.installed
	$(call say,Installing test tools)
	env $$($(CUDA_TOOLS) --environment 2> /dev/null) $(PIP) --no-build-isolation ".[train,test]" $(TORCH)
	@touch $@

$(VENV)/.lint-tools: pyproject.toml $(VENV)/.torch
	$(call say,Installing lint tools)
	$(PIP) $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@
