// Runs CUDA kernels on the CPU: threads are fibers in seeded random order, shared memory is poisoned and checked, and
// asynchronous copies arrive as late as allowed. ptx.cuh in this folder calls these functions; kernels are unchanged.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace qlora::simt {

// ---- for tests ----

struct Counters {
  uint64_t launches, barriers, mma;
  uint64_t global_load_bytes, global_load_sectors,
      global_load_ideal;  // sectors of 32 bytes; ideal: distinct bytes / 32
  uint64_t global_store_bytes, global_store_sectors, global_store_ideal;
  uint64_t shared_load_waves, shared_load_ideal;  // per phase of a request: most words in one bank; ideally one
  uint64_t shared_store_waves, shared_store_ideal;
};

// Seed of the schedules from now on.
void set_seed(uint64_t seed);
Counters& counters();
void set_counting(bool on);  // counts memory accesses; off by default, because it takes most of the time

// The largest shared memory that a launch may request.
void set_shared_limit(int bytes);

// Another executor of launches, e.g. one that runs the compiled kernel. It gets symbol name, grid, threads, shared
// bytes and parameters, and returns null or an error text that lives until the next launch. A null launcher selects
// fibers.
using Launcher = const char* (*)(const char* kernel, const int64_t* grid, int threads, int shared_bytes,
                                 const void* params, int64_t params_bytes);
void set_launcher(Launcher launcher);

// ---- for the host implementations of device functions ----

struct Index {
  int thread, threads;
  int64_t block[3], blocks[3];
};
const Index& index();

// Runs every thread of every block; returns null or an error text that lives until the next launch.
const char* launch(const void* kernel, const int64_t (&grid)[3], int threads, int shared_bytes, const void* params,
                   int64_t params_bytes, const std::function<void()>& body);

void sync_threads();
void sync_group(int group, int threads);  // barrier of threads [group * threads, (group + 1) * threads)

// Every lane of the warp calls this with its own `mine`, at the same place in the program, which `place` names. The
// last lane to arrive runs `all` on the 32 pointers.
void collective(const char* place, void* mine, const std::function<void(void* const* lanes)>& all);

void* shared_read(uint32_t address, int bytes);  // checked; returns a pointer to the bytes
void shared_write(uint32_t address, const void* from, int bytes);
void global_read(const void* p, int bytes);  // counted
void global_write(const void* p, int bytes);

void cp_async(uint32_t to, const void* from);  // 16 bytes
void cp_async_commit();
void cp_async_wait(int pending);
void count_mma();

}  // namespace qlora::simt
