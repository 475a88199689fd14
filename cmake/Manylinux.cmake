# Libraries for older systems: qlora_for_old_systems(target) makes a target ask for no more than manylinux_2_28 has.
#
#   QLORA_MANYLINUX   OFF, or the glibc release, e.g. 2.28 (`make wheels`)

set(QLORA_MANYLINUX OFF CACHE STRING "Oldest glibc that the libraries have to load on; OFF: the one of this machine")

if(QLORA_MANYLINUX)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/glibc_stubs.py" "${CMAKE_CURRENT_BINARY_DIR}/glibc_stubs"
            "${QLORA_MANYLINUX}" "${CMAKE_CXX_COMPILER}"
    OUTPUT_VARIABLE glibc_stubs OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" glibc_stubs "${glibc_stubs}")
  if(glibc_stubs)
    add_library(qlora_manylinux OBJECT "${CMAKE_CURRENT_LIST_DIR}/manylinux.cpp")
  endif()
endif()

function(qlora_for_old_systems target)
  if(NOT TARGET qlora_manylinux)
    return()
  endif()
  # The script keeps what manylinux.cpp defines out of other libraries' sight.
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:qlora_manylinux>)
  target_link_options(${target} PRIVATE "LINKER:--version-script=${CMAKE_CURRENT_FUNCTION_LIST_DIR}/exports.map")
  # The CUDA runtime, an archive behind the stubs on the command line, needs them too: they cannot be dropped before.
  if(target STREQUAL "qlora_cuda")
    target_link_libraries(${target} PRIVATE -Wl,--no-as-needed ${glibc_stubs})
  else()
    target_link_libraries(${target} PRIVATE -Wl,--as-needed ${glibc_stubs} -Wl,--no-as-needed)
  endif()
endfunction()
