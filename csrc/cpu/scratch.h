// Working memory of a kernel: one buffer a thread and ISA, grown on demand.
#pragma once

#include <cstdlib>

namespace qlora::cpu {
namespace {

// One buffer a thread, kept for the life of the thread: 300 KB from malloc on each call would be unmapped every time.
struct Scratch {
  float* data = nullptr;
  size_t floats = 0;
  ~Scratch() { std::free(data); }
  // At least `count` floats, aligned to 64 bytes; what was in them before is lost.
  float* get(size_t count) {
    if (count > floats) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
      if (data == nullptr) std::abort();  // 300 KB: the process is lost
      floats = count;
    }
    return data;
  }
};
thread_local Scratch scratch;

}  // namespace
}  // namespace qlora::cpu
