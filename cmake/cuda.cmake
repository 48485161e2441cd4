# Adds the CUDA kernels to _C: NVCC is the compiler, CUDA_SOURCES the files.
#
# nvcc is called as it is.  CMake's CUDA language would first compile and link probes (10 s), and would take the toolkit
# of the nvcc it is given from its path, which is wrong when that is a wrapper.

# The toolkit: CUDA_HOME, or where nvcc says that it is.
set(CUDA_ROOT $ENV{CUDA_HOME})
if(NOT CUDA_ROOT)
  execute_process(COMMAND ${NVCC} --dryrun -c probe.cu ERROR_VARIABLE NVCC_DRYRUN OUTPUT_QUIET)
  if(NVCC_DRYRUN MATCHES "TOP=([^\r\n]+)")
    get_filename_component(CUDA_ROOT "${CMAKE_MATCH_1}" REALPATH)
  endif()
endif()
find_library(CUDART_STATIC cudart_static HINTS ${CUDA_ROOT}
  PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib NO_CMAKE_FIND_ROOT_PATH)
if(NOT CUDART_STATIC)
  message(STATUS "cibr_kernels: nvcc is ${NVCC}, but libcudart_static.a is not under '${CUDA_ROOT}': building the CPU kernels only")
  return()
endif()

# Machine code for these, as far as this nvcc knows them, and PTX of compute capability 8.0 for everything else.  One
# machine needs only its own: CIBR_CUDA_ARCHITECTURES=90a pip install .
set(CUDA_ARCHITECTURES 80 90a 100a 120)
if(DEFINED ENV{CIBR_CUDA_ARCHITECTURES})
  separate_arguments(CUDA_ARCHITECTURES UNIX_COMMAND "$ENV{CIBR_CUDA_ARCHITECTURES}")
endif()
execute_process(COMMAND ${NVCC} --list-gpu-code OUTPUT_VARIABLE NVCC_KNOWS OUTPUT_STRIP_TRAILING_WHITESPACE)
set(CUDA_TARGETS)
foreach(arch ${CUDA_ARCHITECTURES})
  string(REPLACE a "" listed ${arch})  # the list has no "a"
  if(NVCC_KNOWS MATCHES "sm_${listed}(\r?\n|$)")
    list(APPEND CUDA_TARGETS -gencode arch=compute_${arch},code=sm_${arch})
  endif()
endforeach()
list(APPEND CUDA_TARGETS -gencode arch=compute_80,code=compute_80)

foreach(source ${CUDA_SOURCES})
  file(RELATIVE_PATH object ${CMAKE_CURRENT_SOURCE_DIR}/csrc ${source})
  string(REPLACE / _ object ${object})
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${object}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${NVCC} -c ${source} -o ${object} -MD -MF ${object}.d -std=c++17 -O3 -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
            --threads 2 ${CUDA_TARGETS} -Xcompiler=-fPIC,-fvisibility=hidden
    DEPENDS ${source}
    DEPFILE ${object}.d
    COMMENT "nvcc ${source}"
    VERBATIM)
  target_sources(_C PRIVATE ${object})
endforeach()
find_package(Threads REQUIRED)
target_link_libraries(_C PRIVATE ${CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
target_compile_definitions(_C PRIVATE CK_HAVE_CUDA=1)
message(STATUS "cibr_kernels: CUDA kernels with ${NVCC}, toolkit ${CUDA_ROOT}")
