# Finds what a LibTorch stable-ABI library needs of the torch in the build environment: one include folder, one library.
# find_package(Torch) would do the same and go looking for a CUDA toolkit as well.
#
# Result: target TorchStable::TorchStable, variable TORCH_VERSION_FOUND.

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.metadata as m, pathlib, sys
d = m.distribution('torch')
print(pathlib.Path(d.locate_file('torch')).resolve().as_posix() + ';' + d.version)"
  OUTPUT_VARIABLE torch_location
  ERROR_VARIABLE torch_error
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE torch_result)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: pip install 'torch>=2.11'\n${torch_error}")
endif()
list(GET torch_location 0 torch_root)
list(GET torch_location 1 TORCH_VERSION_FOUND)
if(TORCH_VERSION_FOUND VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${TORCH_VERSION_FOUND} is too old: the stable ABI of torch 2.11 or newer is needed")
endif()

add_library(TorchStable::TorchStable INTERFACE IMPORTED)
target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE "${torch_root}/include")
target_link_libraries(TorchStable::TorchStable INTERFACE "${torch_root}/lib/libtorch_cpu.so")
