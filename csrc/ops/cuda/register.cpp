// Registers the CUDA implementations; libqlora_cuda.so is loaded only where torch has CUDA.
#include "ops/cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(qlora, CUDA, m) { qlora::ops_cuda::implement_cuda_ops(m); }
