// Shared by the CPU ops: the active kernels, allocation, torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>

#include "cpu/dispatch.h"
#include "ops/checks.h"

namespace qlora::ops {

inline const cpu::KernelTable& active_kernels() {
  const char* bad_value = nullptr;
  const cpu::KernelTable* table = cpu::active_table(&bad_value);
  STD_TORCH_CHECK(table != nullptr, cpu::kIsaVariable, "='", bad_value ? bad_value : "",
                  "' is unknown: use scalar, avx2 or avx512");
  return *table;
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

// Working memory of a kernel on this thread, aligned to 64 bytes; what was in it before is lost. Kept for the life of
// the thread: 300 KB from malloc at each call would be unmapped and faulted in again every time.
inline float* thread_scratch(int64_t floats) {
  struct Buffer {
    void* data = nullptr;
    int64_t floats = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (floats > buffer.floats) {
    std::free(buffer.data);
    buffer.floats = 0;
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(ceil_div(floats, 16) * 64));
    STD_TORCH_CHECK(buffer.data != nullptr, "out of memory: ", floats * 4, " bytes of working memory for a kernel");
    buffer.floats = floats;
  }
  return static_cast<float*>(buffer.data);
}

// Runs fn(begin, end) over [0, count) on torch's own threads; obeys torch.set_num_threads.
template <class Fn>
void parallel(int64_t count, int64_t grain, const Fn& fn) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, fn);
}

}  // namespace qlora::ops
