# Decides whether libqlora_cuda.so is built, and with which nvcc for which GPUs.
#
#   QLORA_CUDA        AUTO (when torch has CUDA and nvcc is found), ON, OFF; also an environment variable
#   QLORA_CUDA_ARCHS  compute capabilities, e.g. "86;90"; all that the kernels know by default; also an environment variable
#
# Result: QLORA_WITH_CUDA; with it the language CUDA is enabled.

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

set(oldest_nvcc 12.8)  # the first that knows sm_100 and sm_120
string(CONCAT how_to_get_nvcc
  "Install the CUDA toolkit ${oldest_nvcc} or newer (its nvcc on PATH, or CUDACXX or CUDA_HOME set), or the compiler from PyPI: "
  "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvtx, "
  "and set CUDACXX to the nvcc that it brings. QLORA_CUDA=OFF builds for the CPU only.")

set(QLORA_WITH_CUDA FALSE)
if(QLORA_CUDA STREQUAL "OFF")
  message(STATUS "qlora: no CUDA operators (QLORA_CUDA=OFF)")
elseif(TORCH_CUDA_VERSION STREQUAL "")
  if(QLORA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QLORA_CUDA=ON, but torch ${TORCH_VERSION_FOUND} has no CUDA: install a CUDA build of torch")
  endif()
  message(STATUS "qlora: no CUDA operators (torch ${TORCH_VERSION_FOUND} has no CUDA)")
else()
  find_program(nvcc NAMES nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(DEFINED ENV{CUDACXX})
    set(nvcc "$ENV{CUDACXX}")
  endif()
  set(nvcc_version "")
  string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TORCH_CUDA_VERSION}")
  if(nvcc)
    execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
    string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${nvcc_text}")
    set(nvcc_version "${CMAKE_MATCH_1}")
  endif()
  set(problem "")
  if(NOT nvcc)
    set(problem "torch ${TORCH_VERSION_FOUND} has CUDA ${TORCH_CUDA_VERSION}, but no nvcc was found. ${how_to_get_nvcc}")
  elseif(nvcc_version STREQUAL "")
    set(problem "${nvcc} does not run. ${how_to_get_nvcc}")
  elseif(nvcc_version VERSION_LESS oldest_nvcc)
    set(problem "${nvcc} is release ${nvcc_version}, which is too old. ${how_to_get_nvcc}")
  elseif(NOT nvcc_version MATCHES "^${torch_cuda_major}\\.")
    # The library brings its own CUDA runtime, which asks for a driver of its own release.
    set(problem "${nvcc} is release ${nvcc_version}, but torch was built for CUDA ${TORCH_CUDA_VERSION}: the driver may be too old for it. Use an nvcc ${torch_cuda_major}.x.")
  endif()
  if(NOT problem STREQUAL "")
    if(QLORA_CUDA STREQUAL "ON")
      message(FATAL_ERROR "${problem}")
    endif()
    message(WARNING "qlora: building without CUDA operators. ${problem}")
  else()
    set(QLORA_WITH_CUDA TRUE)
    set(CMAKE_CUDA_COMPILER "${nvcc}")
    # Machine code for every listed GPU, and PTX of the newest one for GPUs to come.
    list(TRANSFORM QLORA_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
    list(GET QLORA_CUDA_ARCHS -1 newest_arch)
    list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest_arch}-virtual")
    enable_language(CUDA)
    message(STATUS "qlora: CUDA operators by nvcc ${nvcc_version} for ${QLORA_CUDA_ARCHS}")
  endif()
endif()
