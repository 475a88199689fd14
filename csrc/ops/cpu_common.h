// Shared by the CPU ops: the active kernels, allocation, torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

// Runs fn(begin, end) over [0, count) on torch's own threads; obeys torch.set_num_threads.
template <class Fn>
void parallel(int64_t count, int64_t grain, const Fn& fn) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, fn);
}

}  // namespace qlora::ops
