# Finds the include folder and the library of the installed torch that a LibTorch stable-ABI library needs.
# find_package(Torch) would also search for a CUDA toolkit.
#
# Result: targets TorchStable::TorchStable and TorchStable::Cuda, variables TORCH_VERSION_FOUND and TORCH_CUDA_VERSION
# (empty without CUDA).

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.metadata as m, pathlib, re
d = m.distribution('torch')
root = pathlib.Path(d.locate_file('torch')).resolve()
cuda = re.search(r'^cuda\\b.*=\\s*.([0-9.]+).\\s*$', (root / 'version.py').read_text(), re.M)
print(root.as_posix() + ';' + d.version + ';' + (cuda.group(1) if cuda else 'none'))"
  OUTPUT_VARIABLE torch_location
  ERROR_VARIABLE torch_error
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE torch_result)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: pip install 'torch>=2.11'\n${torch_error}")
endif()
list(GET torch_location 0 torch_root)
list(GET torch_location 1 TORCH_VERSION_FOUND)
list(GET torch_location 2 TORCH_CUDA_VERSION)
if(TORCH_CUDA_VERSION STREQUAL "none")
  set(TORCH_CUDA_VERSION "")
endif()
if(TORCH_VERSION_FOUND VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${TORCH_VERSION_FOUND} is too old: the stable ABI of torch 2.11 or newer is needed")
endif()

add_library(TorchStable::TorchStable INTERFACE IMPORTED)
target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${torch_root}/include")
target_link_libraries(TorchStable::TorchStable INTERFACE "${torch_root}/lib/libtorch_cpu.so")

# Only in a torch with CUDA: needed for the current stream.
add_library(TorchStable::Cuda INTERFACE IMPORTED)
target_link_libraries(TorchStable::Cuda INTERFACE TorchStable::TorchStable "${torch_root}/lib/libtorch_cuda.so")
