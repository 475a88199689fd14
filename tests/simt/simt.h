// A GPU block on the CPU: its threads are fibers in seeded random order, its shared memory is poisoned and watched, and
// copies arrive as late as they may. The twin of ptx.cuh in this folder calls these functions; kernels do not know.
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
  uint64_t shared_load_waves, shared_load_ideal;  // most words in one bank, and one, for each phase of a request
  uint64_t shared_store_waves, shared_store_ideal;
};

// Seed of the schedules from now on.
void set_seed(uint64_t seed);
Counters& counters();
void set_counting(bool on);  // of memory accesses: it takes most of the time, so it is off at first

// What a launch may ask for.
void set_shared_limit(int bytes);

// Another executor of launches, e.g. one that runs the compiled kernel: symbol name, grid, threads, shared bytes and
// parameters. Returns null, or a text that lives until the next launch. Null launcher: the fibers of this file.
using Launcher = const char* (*)(const char* kernel, const int64_t* grid, int threads, int shared_bytes,
                                 const void* params, int64_t params_bytes);
void set_launcher(Launcher launcher);

// ---- for the twins ----

struct Index {
  int thread, threads;
  int64_t block[3], blocks[3];
};
const Index& index();

// Runs every thread of every block; returns null or what was wrong, a text that lives until the next launch.
const char* launch(const void* kernel, const int64_t (&grid)[3], int threads, int shared_bytes, const void* params,
                   int64_t params_bytes, const std::function<void()>& body);

void sync_threads();
void sync_group(int group, int threads);  // threads [group * threads, (group + 1) * threads) meet

// Every lane of the warp calls this with its own `mine`, at one place of the program (`place` tells places apart); the
// last one to come runs `all` on the 32 pointers.
void collective(const char* place, void* mine, const std::function<void(void* const* lanes)>& all);

void* shared_read(uint32_t address, int bytes);  // checked; a pointer to the bytes
void shared_write(uint32_t address, const void* from, int bytes);
void global_read(const void* p, int bytes);  // counted
void global_write(const void* p, int bytes);

void cp_async(uint32_t to, const void* from);  // 16 bytes
void cp_async_commit();
void cp_async_wait(int pending);
void count_mma();

}  // namespace qlora::simt
