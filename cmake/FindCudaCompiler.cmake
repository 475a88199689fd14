# Decides whether libqlora_cuda.so is built, with which nvcc, and for which GPUs.
#
#   QLORA_CUDA        AUTO (builds it if torch has CUDA and nvcc is found), ON or OFF
#   QLORA_CUDA_ARCHS  compute capabilities, e.g. "86;90"; default: all that the kernels support
#
# Both can also be environment variables. Result: QLORA_WITH_CUDA; if true, the language CUDA is enabled.

foreach(variable QLORA_CUDA QLORA_CUDA_ARCHS)
  if(DEFINED ENV{${variable}} AND NOT DEFINED ${variable})
    set(${variable} "$ENV{${variable}}")
  endif()
endforeach()
if("${QLORA_CUDA}" STREQUAL "")
  set(QLORA_CUDA AUTO)
endif()
string(TOUPPER "${QLORA_CUDA}" QLORA_CUDA)
if(NOT QLORA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "QLORA_CUDA='${QLORA_CUDA}' is unknown: use AUTO, ON or OFF")
endif()
if(QLORA_CUDA_ARCHS)
  list(SORT QLORA_CUDA_ARCHS COMPARE NATURAL)
else()
  set(QLORA_CUDA_ARCHS "75;80;86;89;90;100;120")
endif()

set(oldest_nvcc 12.8)  # the first release that supports sm_100 and sm_120
string(CONCAT how_to_get_nvcc
  "Install the CUDA toolkit ${oldest_nvcc} or newer (its nvcc on PATH, or CUDACXX or CUDA_HOME set), or for CUDA 13 the "
  "compiler from PyPI, of torch's release, beside torch: pip install nvidia-cuda-nvcc==${TORCH_CUDA_VERSION}.* and the same of "
  "nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-runtime, nvidia-cuda-cccl, nvidia-nvtx. QLORA_CUDA=OFF builds for the CPU only.")

# Sets nvcc_version, and `problem` to the reason why this nvcc cannot be used, or to an empty string.
function(check_nvcc nvcc)
  set(problem "")
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${text}")
  set(nvcc_version "${CMAKE_MATCH_1}")
  string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA_VERSION}")
  if(nvcc_version STREQUAL "")
    set(problem "${nvcc} does not run. ${how_to_get_nvcc}")
  elseif(nvcc_version VERSION_LESS oldest_nvcc)
    set(problem "${nvcc} is release ${nvcc_version}, which is too old. ${how_to_get_nvcc}")
  elseif(NOT nvcc_version MATCHES "^${torch_cuda_major}\\.")
    # The library contains its own CUDA runtime, which needs a driver of its release.
    set(problem "${nvcc} is release ${nvcc_version}, but torch was built for CUDA ${TORCH_CUDA_VERSION}: the driver may be too old for it. Use an nvcc ${torch_cuda_major}.x. ${how_to_get_nvcc}")
  endif()
  set(problem "${problem}" PARENT_SCOPE)
  set(nvcc_version "${nvcc_version}" PARENT_SCOPE)
endfunction()

# Sets `nvcc` to the nvcc of the PyPI packages installed beside torch, empty if there is none.
function(find_nvcc_of_pypi)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.metadata as m, pathlib
site = pathlib.Path(m.distribution('torch').locate_file(''))
print(*(p.as_posix() for p in sorted(site.glob('nvidia/cu*/bin/nvcc'))), sep=';')"
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(POP_BACK found newest)
  set(nvcc "${newest}" PARENT_SCOPE)
endfunction()

set(QLORA_WITH_CUDA FALSE)
if(QLORA_CUDA STREQUAL "OFF")
  message(STATUS "qlora: no CUDA operators (QLORA_CUDA=OFF)")
elseif(TORCH_CUDA_VERSION STREQUAL "")
  if(QLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QLORA_CUDA=ON, but torch ${TORCH_VERSION_FOUND} has no CUDA: install a CUDA build of torch")
  endif()
  message(STATUS "qlora: no CUDA operators (torch ${TORCH_VERSION_FOUND} has no CUDA)")
else()
  set(problem "torch ${TORCH_VERSION_FOUND} has CUDA ${TORCH_CUDA_VERSION}, but no nvcc was found. ${how_to_get_nvcc}")
  if(DEFINED ENV{CUDACXX})
    set(nvcc "$ENV{CUDACXX}")
    check_nvcc("${nvcc}")
  else()
    find_program(nvcc NAMES nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(nvcc)
      check_nvcc("${nvcc}")
    endif()
    if(NOT problem STREQUAL "")
      unset(nvcc CACHE)
      find_nvcc_of_pypi()
      if(nvcc)
        check_nvcc("${nvcc}")
      endif()
    endif()
  endif()
  if(NOT problem STREQUAL "")
    if(QLORA_CUDA STREQUAL "ON")
      message(FATAL_ERROR "${problem}")
    endif()
    message(WARNING "qlora: building without CUDA operators. ${problem}")
  else()
    set(QLORA_WITH_CUDA TRUE)
    set(CMAKE_CUDA_COMPILER "${nvcc}")
    # nvcc looks for its libraries in lib64; the PyPI packages have them in lib.
    cmake_path(GET nvcc PARENT_PATH nvcc_bin)
    cmake_path(GET nvcc_bin PARENT_PATH toolkit)
    if(NOT EXISTS "${toolkit}/lib64" AND EXISTS "${toolkit}/lib/libcudart_static.a")
      set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${toolkit}/lib")
    endif()
    # Machine code for every listed GPU, and PTX of the newest one for future GPUs.
    list(TRANSFORM QLORA_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
    list(GET QLORA_CUDA_ARCHS -1 newest_arch)
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest_arch}-virtual")
    enable_language(CUDA)
    message(STATUS "qlora: CUDA operators by nvcc ${nvcc_version} for ${QLORA_CUDA_ARCHS}")
  endif()
endif()
