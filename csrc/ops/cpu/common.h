// Helpers of the CPU ops: the active kernels, allocation, torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/isa/dispatch.h"
#include "ops/checks.h"

namespace qlora::ops_cpu {

using namespace ops;

inline const cpu::KernelTable& active_kernels() {
  const char* bad_value = nullptr;
  const cpu::KernelTable* table = cpu::active_table(&bad_value);
  STD_TORCH_CHECK(table != nullptr, cpu::kIsaVariable, "='", bad_value ? bad_value : "", "' is unknown: use ",
                  cpu::kIsaChoices);
  return *table;
}

// Requests huge pages for [begin, end). Page faults for 32 MiB in 4 KiB pages take 8 ms, longer than filling them.
inline void advise_huge_pages(uintptr_t begin, uintptr_t end) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (end > first)
    (void)madvise(reinterpret_cast<void*>(first), (end - first) / kPage * kPage, MADV_HUGEPAGE);  // may fail: a hint
#endif
}

// Requests huge pages for a new tensor of at least 4 MiB; smaller ones gain nothing.
inline const Tensor& on_huge_pages(const Tensor& t) {
  constexpr int64_t kWorthIt = 4 << 20;
  const int64_t bytes = t.numel() * t.element_size();
  const auto begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  if (bytes >= kWorthIt) advise_huge_pages(begin, begin + static_cast<uintptr_t>(bytes));
  return t;
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return on_huge_pages(torch::stable::empty({sizes.begin(), sizes.size()}, dtype));
}

// Scratch memory of this thread, aligned to 64 bytes; a call may discard its previous content. It is kept for the life
// of the thread, because malloc would unmap and fault in 300 KB again at every call.
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
    constexpr int64_t kHuge = 2 << 20;  // a huge page: a panel and its results need one TLB entry
    const int64_t align = floats * 4 > kHuge / 8 ? kHuge : 64, bytes = ceil_div(floats * 4, align) * align;
    buffer.data = std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(bytes));
    STD_TORCH_CHECK(buffer.data != nullptr, "out of memory: ", bytes, " bytes of working memory for a kernel");
    const auto begin = reinterpret_cast<uintptr_t>(buffer.data);
    if (align == kHuge) advise_huge_pages(begin, begin + static_cast<uintptr_t>(bytes));
    buffer.floats = floats;
  }
  return static_cast<float*>(buffer.data);
}

// Runs fn(begin, end) over [0, count) on torch's threads, so that torch.set_num_threads applies.
template <class Fn>
void parallel(int64_t count, int64_t grain, const Fn& fn) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, fn);
}

}  // namespace qlora::ops_cpu
