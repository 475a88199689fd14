// Tests the simt executor with kernels that have one planted fault each. It must report every fault under every
// schedule tried here, and must accept the same kernels without the fault.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device/launch.cuh"

using namespace qlora;
using namespace qlora::cuda;

namespace {

struct Params {
  int fault;  // 0: none
  const float* in;
  float* out;
};

constexpr int kThreads = 64;

// Each thread passes a value to the thread of the same lane in the other warp.
void exchange(Params p) {
  const SharedAddress mine = static_cast<SharedAddress>(ptx::thread() * 4);
  const SharedAddress other = static_cast<SharedAddress>((ptx::thread() + 32) % kThreads * 4);
  ptx::store_shared(mine, ptx::load(p.in + ptx::thread()));
  if (p.fault != 1) ptx::sync_threads();  // 1: missing barrier
  const float value = ptx::load_shared<float>(other);
  if (p.fault != 2) ptx::sync_threads();  // 2: missing barrier before the memory is reused
  ptx::store_shared(mine, value + 1.0f);
  ptx::sync_threads();
  ptx::store(p.out + ptx::thread(), ptx::load_shared<float>(other));
}

void copy_async(Params p) {
  const SharedAddress mine = static_cast<SharedAddress>(ptx::thread() * 16);
  ptx::cp_async_16(mine, p.in + ptx::thread() * 4);
  ptx::cp_async_commit();
  if (p.fault != 1) ptx::cp_async_wait<0>();  // 1: missing wait
  if (p.fault == 2)
    ptx::sync_warp();
  else
    ptx::sync_threads();  // 2: the other warp's copy is read after a barrier of this warp only
  ptx::store(p.out + ptx::thread(),
             ptx::load_shared<float>(static_cast<SharedAddress>((ptx::thread() + 32) % kThreads * 16)));
  ptx::cp_async_wait<0>();
}

void pipeline(Params p) {
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(static_cast<SharedAddress>((stage * kThreads + ptx::thread()) * 16), p.in + ptx::thread() * 4);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  const int stage = p.fault == 1 ? 1 : 0;  // 1: reads the copy group that may not have arrived
  ptx::store(p.out + ptx::thread(),
             ptx::load_shared<float>(static_cast<SharedAddress>((stage * kThreads + ptx::thread()) * 16)));
  ptx::cp_async_wait<0>();
}

void shared_bounds(Params p) {
  const SharedAddress mine =
      static_cast<SharedAddress>(ptx::thread() * 4 + (p.fault == 1 ? 4 : 0));  // 1: one word too far
  ptx::store_shared(mine, 1.0f);
  ptx::sync_threads();
  ptx::store(p.out + ptx::thread(), ptx::load_shared<float>(mine));
}

void uninitialised(Params p) {
  if (p.fault != 1 || ptx::thread() != 5)
    ptx::store_shared(static_cast<SharedAddress>(ptx::thread() * 4), 2.0f);  // 1: a gap
  ptx::sync_threads();
  ptx::store(p.out + ptx::thread(), ptx::load_shared<float>(static_cast<SharedAddress>(ptx::thread() * 4)));
}

void divergent_barrier(Params p) {
  if (p.fault != 1 || ptx::thread() != 40) ptx::sync_threads();  // 1: one thread skips it
  ptx::store(p.out + ptx::thread(), 3.0f);
}

void race_on_a_word(Params p) {
  if (ptx::lane() == 0 && (p.fault == 1 || ptx::warp() == 0))
    ptx::store_shared(0, static_cast<float>(ptx::warp()));  // 1: both warps write
  ptx::sync_threads();
  ptx::store(p.out + ptx::thread(), ptx::load_shared<float>(0));
}

void race_in_a_warp(Params p) {
  ptx::store_shared(static_cast<SharedAddress>(ptx::thread() * 4), 4.0f);
  if (p.fault != 1) ptx::sync_warp();  // 1: lanes of a warp do not run in lockstep
  ptx::store(p.out + ptx::thread(), ptx::load_shared<float>(static_cast<SharedAddress>((ptx::thread() ^ 1) * 4)));
}

void partial_shuffle(Params p) {
  float value = 1.0f;
  if (p.fault != 1 || ptx::lane() != 7) value = ptx::shuffle_xor(value, 1);  // 1: one lane does not take part
  ptx::store(p.out + ptx::thread(), value);
}

void never_waited(Params p) {
  ptx::cp_async_16(static_cast<SharedAddress>(ptx::thread() * 16), p.in + ptx::thread() * 4);
  ptx::cp_async_commit();
  if (p.fault != 1) ptx::cp_async_wait<0>();  // 1: the block ends with unfinished copies
  ptx::store(p.out + ptx::thread(), 5.0f);
}

void misaligned(Params p) {
  ptx::store_shared(static_cast<SharedAddress>(ptx::thread() * 16 + (p.fault == 1 ? 4 : 0)), Floats4{1, 2, 3, 4});
  ptx::store(p.out + ptx::thread(), 6.0f);
}

// Two groups of two warps, each with its own barrier; values pass between the warps of a group.
void groups(Params p) {
  const int group = ptx::thread() / kThreads, inside = ptx::thread() % kThreads;
  const SharedAddress mine = static_cast<SharedAddress>(ptx::thread() * 4);
  ptx::store_shared(mine, 7.0f);
  if (p.fault != 1) ptx::sync_group<kThreads>(group);  // 1: missing barrier
  const int of = p.fault == 2 ? 1 - group : group;     // 2: another group's value after this group's barrier
  const int other = of * kThreads + (inside + 32) % kThreads;
  const float value = ptx::load_shared<float>(static_cast<SharedAddress>(other * 4));
  ptx::sync_threads();
  ptx::store_shared(mine, value);
  ptx::store(p.out + inside, value);
}

struct Case {
  const char* name;
  void (*kernel)(Params);
  int faults;
  const char*
      expected[2];  // part of the report of fault 1 and 2; alternatives, because the report depends on the schedule
  int shared_bytes;
  int threads = kThreads;
};

const Case kCases[] = {
    {"exchange", exchange, 2, {"race|uninitialised", "race"}, kThreads * 4},
    {"copy_async", copy_async, 2, {"not waited for", "race|uninitialised|not waited for"}, kThreads * 16},
    {"pipeline", pipeline, 1, {"not waited for", ""}, kThreads * 32},
    {"shared_bounds", shared_bounds, 1, {"out of bounds", ""}, kThreads * 4},
    {"uninitialised", uninitialised, 1, {"uninitialised", ""}, kThreads * 4},
    {"divergent_barrier", divergent_barrier, 1, {"not all threads", ""}, 0},
    {"race_on_a_word", race_on_a_word, 1, {"race", ""}, 4},
    {"race_in_a_warp", race_in_a_warp, 1, {"race|uninitialised", ""}, kThreads * 4},
    {"partial_shuffle", partial_shuffle, 1, {"not all threads", ""}, 0},
    {"never_waited", never_waited, 1, {"never waited", ""}, kThreads * 16},
    {"misaligned", misaligned, 1, {"misaligned", ""}, kThreads * 16 + 16},
    {"groups", groups, 2, {"race|uninitialised", "race|uninitialised"}, 2 * kThreads * 4, 2 * kThreads},
};

// Whether one of the alternatives (separated by |) is part of the text.
bool matches(const char* text, const std::string& alternatives) {
  for (size_t begin = 0; begin <= alternatives.size();) {
    const size_t end = std::min(alternatives.find('|', begin), alternatives.size());
    if (std::strstr(text, alternatives.substr(begin, end - begin).c_str()) != nullptr) return true;
    begin = end + 1;
  }
  return false;
}

// Reads one element beyond a separate buffer, which only AddressSanitizer detects.
void global_bounds(Params p) { ptx::store(p.out + ptx::thread(), ptx::load(p.in + ptx::thread() + p.fault)); }

int run_out_of_bounds() {
  const std::vector<float> in(kThreads);
  std::vector<float> out(kThreads);
  start(global_bounds, {1}, kThreads, 0, nullptr, Params{1, in.data(), out.data()});
  return 0;  // not reached under AddressSanitizer
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "out-of-bounds") == 0) return run_out_of_bounds();
  int failures = 0, runs = 0;
  alignas(16) float in[kThreads * 4], out[kThreads];
  for (int i = 0; i < kThreads * 4; ++i) in[i] = static_cast<float>(i);
  for (const Case& c : kCases)
    for (int fault = 0; fault <= c.faults; ++fault)
      for (uint64_t seed = 1; seed <= 20; ++seed, ++runs) {
        simt::set_seed(seed);
        const Status status = start(c.kernel, {2}, c.threads, c.shared_bytes, nullptr, Params{fault, in, out});
        const bool right = fault == 0 ? status.error == nullptr
                                      : status.error != nullptr && matches(status.error, c.expected[fault - 1]);
        if (right) continue;
        ++failures;
        std::printf("%s, fault %d, seed %d: %s\n", c.name, fault, static_cast<int>(seed),
                    status.error ? status.error : "nothing was found");
        break;
      }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0;
}
