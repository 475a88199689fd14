// The executor declared in simt.h: fibers, random schedules, checks of shared memory, counters.
#include "simt.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define QLORA_ASAN 1
#endif

// Switches stacks; it saves only the registers that the calling convention requires a function to preserve.
#if defined(__x86_64__)
extern "C" void qlora_simt_switch(void** save, void* load);
asm(R"(
.text
.globl qlora_simt_switch
.hidden qlora_simt_switch
.type qlora_simt_switch, @function
qlora_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qlora_simt_switch, .-qlora_simt_switch
)");
#else
#error "simt needs its switch of stacks written for this architecture (20 instructions, see above)"
#endif

namespace qlora::simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr int kCellBytes = 2;      // the smallest access to shared memory
constexpr uint8_t kPoison = 0xFF;  // a nan in every float type

enum class State { kRunnable, kAtBarrier, kAtGroupBarrier, kAtCollective, kDone };

struct Copy {
  uint32_t to;
  const void* from;
};

// Accesses of one kind between two collectives of a warp. The i-th accesses of all lanes count as one instruction,
// which is right if the lanes take the same path. Predicated accesses may shift the order; counts are then a little too
// high.
struct Access {
  uint64_t address;
  int bytes, lane;
};
using Lanes = std::vector<Access>;
enum Kind { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore, kKinds };

struct Thread {
  void* stack_pointer = nullptr;
  State state = State::kDone;
  const char* place = nullptr;
  void* mine = nullptr;                   // argument of the collective
  std::vector<Copy> open;                 // not committed
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  size_t ordinal[kKinds] = {};
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Warp {
  int arrived = 0;        // lanes at a collective
  uint32_t meetings = 0;  // collectives so far; accesses of two lanes between the same two collectives are unordered
  std::vector<Lanes> accesses[kKinds];
};

// The barriers a thread has passed. Accesses of two threads are ordered if a barrier that both share lies between them.
struct Moment {
  uint32_t barriers = 0, group_barriers = 0, meetings = 0;  // of the block, its group, its warp
};

// The last accesses to two bytes of shared memory, and the barriers passed before them.
struct Cell {
  bool written = false, pending = false;
  int16_t writer = -1, first_reader = -1, last_reader = -1;  // threads; readers lie in first_reader … last_reader
  Moment write, read;
};

struct Machine {
  std::mt19937_64 random{1};
  Counters counters{};
  Launcher launcher = nullptr;
  bool counting = false;
  int shared_limit = 227 * 1024;
  Index index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Cell> cells;
  std::unique_ptr<uint8_t[]> shared;
  int shared_bytes = 0;
  uint32_t barriers = 0;  // of this block
  int group_size = 0;     // threads of a group with its own barrier; 0: no group barrier yet
  std::vector<uint32_t> group_barriers;
  char* stacks = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack_bottom = nullptr;
  size_t scheduler_stack_size = 0;
  const std::function<void()>* body = nullptr;
  std::string kernel, error;
};
Machine machine;

Thread& self() { return machine.threads[static_cast<size_t>(machine.index.thread)]; }
int warp_of(int thread) { return thread / 32; }

std::string where() {
  const Index& i = machine.index;
  return " [thread " + std::to_string(i.thread) + " of block (" + std::to_string(i.block[0]) + ", " +
         std::to_string(i.block[1]) + ", " + std::to_string(i.block[2]) + "), " + machine.kernel + "]";
}

char* stack_of(int thread) { return machine.stacks + static_cast<size_t>(thread) * kStackBytes; }

void to_scheduler(bool for_good = false) {
  Thread& me = self();
#ifdef QLORA_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.fake_stack, machine.scheduler_stack_bottom,
                                 machine.scheduler_stack_size);
#endif
  (void)for_good;
  qlora_simt_switch(&me.stack_pointer, machine.scheduler);
#ifdef QLORA_ASAN
  __sanitizer_finish_switch_fiber(me.fake_stack, &machine.scheduler_stack_bottom, &machine.scheduler_stack_size);
#endif
}

// Aborts the launch. This fiber never runs again, so objects on its stack are not destroyed.
void fail(const std::string& text) {
  if (machine.error.empty()) machine.error = text + where();
  self().state = State::kDone;
  for (;;) to_scheduler();
}

void fiber_main() {
#ifdef QLORA_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_bottom, &machine.scheduler_stack_size);
#endif
  (*machine.body)();
  self().state = State::kDone;
  to_scheduler(true);
  std::abort();
}

void resume(int thread) {
  machine.index.thread = thread;
  Thread& t = machine.threads[static_cast<size_t>(thread)];
#ifdef QLORA_ASAN
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, stack_of(thread), kStackBytes);
#endif
  qlora_simt_switch(&machine.scheduler, t.stack_pointer);
#ifdef QLORA_ASAN
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void prepare(Thread& t, int thread) {
  t = Thread{};
  t.state = State::kRunnable;
#ifdef QLORA_ASAN
  __asan_unpoison_memory_region(stack_of(thread), kStackBytes);  // an aborted fiber never left its frames
#endif
  // The frame that qlora_simt_switch pops: six registers and the return address, on a stack aligned as after a call.
  auto* top = reinterpret_cast<uint64_t*>(stack_of(thread) + kStackBytes) - 2;
  *top = reinterpret_cast<uint64_t>(&fiber_main);
  for (int i = 1; i <= 6; ++i) top[-i] = 0;
  t.stack_pointer = top - 6;
}

// ---- counters ----

void record(Kind kind, uint64_t address, int bytes) {
  if (!machine.counting) return;
  auto& requests = machine.warps[static_cast<size_t>(warp_of(machine.index.thread))].accesses[kind];
  const size_t i = self().ordinal[kind]++;
  if (requests.size() <= i) requests.resize(i + 1);
  requests[i].push_back({address, bytes, machine.index.thread % 32});
}

uint64_t sectors_of(const Lanes& lanes, uint64_t* ideal_bytes) {
  static thread_local std::vector<uint64_t> pieces;
  pieces.clear();
  for (const Access& a : lanes)
    for (uint64_t b = a.address / 2; b < (a.address + static_cast<uint64_t>(a.bytes) + 1) / 2; ++b) pieces.push_back(b);
  std::sort(pieces.begin(), pieces.end());
  pieces.erase(std::unique(pieces.begin(), pieces.end()), pieces.end());
  *ideal_bytes = 2 * pieces.size();
  uint64_t sectors = 0, last = ~uint64_t{0};
  for (const uint64_t piece : pieces)
    if (piece / 16 != last) ++sectors, last = piece / 16;
  return sectors;
}

// A request of 4 bytes per lane is one phase of 32 lanes; 8 bytes are two phases of 16, 16 bytes are four of 8.
uint64_t waves_of(const Lanes& lanes, uint64_t* ideal) {
  uint64_t waves = 0;
  const int per_phase = lanes[0].bytes == 16 ? 8 : lanes[0].bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += per_phase) {
    std::vector<uint64_t> words[32];
    bool used = false;
    for (const Access& a : lanes) {
      if (a.lane < first || a.lane >= first + per_phase) continue;
      used = true;
      for (uint64_t w = a.address / 4; w < (a.address + static_cast<uint64_t>(a.bytes) + 3) / 4; ++w) {
        std::vector<uint64_t>& bank = words[w % 32];
        if (std::find(bank.begin(), bank.end(), w) == bank.end()) bank.push_back(w);
      }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    waves += most;
    *ideal += used;
  }
  return waves;
}

void flush(Warp& warp, int first_thread) {
  if (!machine.counting) return;
  Counters& c = machine.counters;
  for (int kind = 0; kind < kKinds; ++kind) {
    for (Lanes& lanes : warp.accesses[kind]) {
      if (lanes.empty()) continue;
      uint64_t ideal = 0;
      if (kind == kGlobalLoad || kind == kGlobalStore) {
        const uint64_t sectors = sectors_of(lanes, &ideal);
        (kind == kGlobalLoad ? c.global_load_sectors : c.global_store_sectors) += sectors;
        (kind == kGlobalLoad ? c.global_load_bytes : c.global_store_bytes) += ideal;
        (kind == kGlobalLoad ? c.global_load_ideal : c.global_store_ideal) += (ideal + 31) / 32;
      } else {
        (kind == kSharedLoad ? c.shared_load_waves : c.shared_store_waves) += waves_of(lanes, &ideal);
        (kind == kSharedLoad ? c.shared_load_ideal : c.shared_store_ideal) += ideal;
      }
      lanes.clear();
    }
    for (int i = first_thread; i < std::min(first_thread + 32, machine.index.threads); ++i)
      machine.threads[static_cast<size_t>(i)].ordinal[kind] = 0;
  }
}

// ---- shared memory ----

std::string at(uint32_t address) { return " at shared byte " + std::to_string(address); }

void check_range(uint32_t address, int bytes, const char* what) {
  if (address % static_cast<uint32_t>(bytes) != 0) fail(std::string("misaligned ") + what + at(address));
  if (static_cast<int64_t>(address) + bytes > machine.shared_bytes)
    fail(std::string("out of bounds: ") + what + at(address) + " of " + std::to_string(machine.shared_bytes));
}

int group_of(int thread) { return machine.group_size == 0 ? -1 : thread / machine.group_size; }

Moment now() {
  const int me = machine.index.thread, group = group_of(me);
  return {machine.barriers, group < 0 ? 0 : machine.group_barriers[static_cast<size_t>(group)],
          machine.warps[static_cast<size_t>(warp_of(me))].meetings};
}

// Whether there was no barrier of the block, their group or their warp between the earlier access of threads `first` to
// `last` and the current access of this thread.
bool unordered(int first, int last, const Moment& then) {
  const int me = machine.index.thread;
  const Moment here = now();
  if (first < 0 || (first == me && last == me) || then.barriers != here.barriers) return false;
  const auto all_mine = [&](int of_first, int of_last, int mine) { return of_first == mine && of_last == mine; };
  if (group_of(me) >= 0 && all_mine(group_of(first), group_of(last), group_of(me)) &&
      then.group_barriers != here.group_barriers)
    return false;
  return !all_mine(warp_of(first), warp_of(last), warp_of(me)) || then.meetings == here.meetings;
}

void note_write(Cell& cell, uint32_t address) {
  const auto me = static_cast<int16_t>(machine.index.thread);
  if (cell.written && unordered(cell.writer, cell.writer, cell.write))
    fail("race: written by thread " + std::to_string(cell.writer) + " and by this one without a barrier between" +
         at(address));
  if (unordered(cell.first_reader, cell.last_reader, cell.read))
    fail("race: read by another thread and written by this one without a barrier between" + at(address));
  cell = Cell{};
  cell.written = true;
  cell.writer = me;
  cell.write = now();
}

void note_read(Cell& cell, uint32_t address) {
  const auto me = static_cast<int16_t>(machine.index.thread);
  if (cell.pending) fail("read of a cp.async that was not waited for" + at(address));
  if (!cell.written) fail("read of uninitialised shared memory" + at(address));
  if (unordered(cell.writer, cell.writer, cell.write))
    fail("race: written by thread " + std::to_string(cell.writer) + " and read by this one without a barrier between" +
         at(address));
  // Earlier readers that are ordered before this one can be forgotten: whatever is ordered after it is after them too.
  const bool alone = cell.first_reader < 0 || !unordered(cell.first_reader, cell.last_reader, cell.read);
  cell.first_reader = alone ? me : std::min(cell.first_reader, me);
  cell.last_reader = alone ? me : std::max(cell.last_reader, me);
  cell.read = now();
}

template <class Fn>
void each_cell(uint32_t address, int bytes, const Fn& fn) {
  for (uint32_t a = address / kCellBytes; a < (address + static_cast<uint32_t>(bytes) + kCellBytes - 1) / kCellBytes;
       ++a)
    fn(machine.cells[a], a * kCellBytes);
}

void arrive(const Copy& copy) {
  std::memcpy(machine.shared.get() + copy.to, copy.from, 16);
  each_cell(copy.to, 16, [](Cell& cell, uint32_t) { cell.pending = false; });
}

// ---- the block ----

void start_block(int threads, int shared_bytes) {
  machine.index.threads = threads;
  machine.threads.resize(static_cast<size_t>(threads));
  machine.warps.assign(static_cast<size_t>((threads + 31) / 32), Warp{});
  // A separate allocation of exactly this length, so that AddressSanitizer detects a single byte too many.
  machine.shared.reset(new uint8_t[static_cast<size_t>(shared_bytes)]);
  std::memset(machine.shared.get(), kPoison, static_cast<size_t>(shared_bytes));
  machine.cells.assign(static_cast<size_t>((shared_bytes + kCellBytes - 1) / kCellBytes), Cell{});
  machine.shared_bytes = shared_bytes;
  machine.barriers = 0;
  machine.group_size = 0;
  for (int i = 0; i < threads; ++i) prepare(machine.threads[static_cast<size_t>(i)], i);
}

std::string standing(int thread) {
  const Thread& t = machine.threads[static_cast<size_t>(thread)];
  return t.state == State::kDone             ? "has ended"
         : t.state == State::kAtBarrier      ? "waits at a barrier"
         : t.state == State::kAtGroupBarrier ? "waits at a barrier of its group"
                                             : std::string("waits at ") + t.place;
}

// No thread can run: either all have reached a barrier, or there is an error.
void release_barrier() {
  const int threads = machine.index.threads;
  int waiting = 0, first = -1, other = -1;
  for (int i = 0; i < threads; ++i) {
    const bool here = machine.threads[static_cast<size_t>(i)].state == State::kAtBarrier;
    waiting += here;
    if (here && first < 0) first = i;
    if (!here) other = i;
  }
  if (waiting < threads) {
    int stuck = first;
    for (int i = 0; i < threads && stuck < 0; ++i)
      if (machine.threads[static_cast<size_t>(i)].state != State::kDone) stuck = i;
    for (int i = 0; i < threads; ++i)  // a thread that stands elsewhere, for the message
      if (machine.threads[static_cast<size_t>(i)].state != machine.threads[static_cast<size_t>(stuck)].state ||
          machine.threads[static_cast<size_t>(i)].place != machine.threads[static_cast<size_t>(stuck)].place)
        other = i;
    machine.error = "not all threads get there: thread " + std::to_string(stuck) + " " + standing(stuck) + ", thread " +
                    std::to_string(other) + " " + standing(other) + " [" + machine.kernel + "]";
    return;
  }
  ++machine.barriers;
  ++machine.counters.barriers;
  for (size_t w = 0; w < machine.warps.size(); ++w) flush(machine.warps[w], static_cast<int>(w) * 32);
  for (Thread& t : machine.threads) t.state = State::kRunnable;
}

void run_block() {
  std::vector<int> warps(machine.warps.size());
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  int lanes[32];
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), machine.random);
    bool ran = false, alive = false;
    for (const int warp : warps) {
      // One warp continues as long as it can; another may overtake it between any two collectives.
      const uint64_t patience = machine.random() % 64 + 1;
      for (uint64_t step = 0; step < patience; ++step) {
        int count = 0;
        for (int i = warp * 32; i < std::min(warp * 32 + 32, machine.index.threads); ++i)
          if (machine.threads[static_cast<size_t>(i)].state == State::kRunnable) lanes[count++] = i;
        if (count == 0) break;
        const int rotation = static_cast<int>(machine.random() % static_cast<uint64_t>(count));
        const bool backwards = machine.random() % 2 != 0;
        for (int i = 0; i < count; ++i) {
          resume(lanes[(backwards ? count - 1 - i + rotation : i + rotation) % count]);
          if (!machine.error.empty()) return;
        }
        ran = true;
      }
    }
    for (const Thread& t : machine.threads) alive = alive || t.state != State::kDone;
    if (!alive) break;
    if (!ran) release_barrier();
    if (!machine.error.empty()) return;
  }
  for (size_t w = 0; w < machine.warps.size(); ++w) flush(machine.warps[w], static_cast<int>(w) * 32);
  for (const Thread& t : machine.threads)
    if (!t.groups.empty() || !t.open.empty())
      machine.error = "a cp.async was never waited for [" + machine.kernel + "]";
}

}  // namespace

void set_shared_limit(int bytes) { machine.shared_limit = bytes; }
void set_counting(bool on) { machine.counting = on; }
void set_seed(uint64_t seed) { machine.random.seed(seed); }
Counters& counters() { return machine.counters; }
void set_launcher(Launcher launcher) { machine.launcher = launcher; }
const Index& index() { return machine.index; }
void count_mma() { machine.counters.mma += machine.index.thread % 32 == 0; }

const char* launch(const void* kernel, const int64_t (&grid)[3], int threads, int shared_bytes, const void* params,
                   int64_t params_bytes, const std::function<void()>& body) {
  Dl_info info{};
  machine.kernel = dladdr(const_cast<void*>(kernel), &info) != 0 && info.dli_sname != nullptr ? info.dli_sname : "?";
  ++machine.counters.launches;
  if (shared_bytes > machine.shared_limit) return "a launch asks for more shared memory than the GPU has";
  if (machine.launcher != nullptr)
    return machine.launcher(machine.kernel.c_str(), grid, threads, shared_bytes, params, params_bytes);
  machine.error.clear();
  if (threads > kMaxThreads || threads % 32 != 0) return "simt runs whole warps, at most 1024 threads";
  if (machine.stacks == nullptr) {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return "simt: no memory for the stacks";
    machine.stacks = static_cast<char*>(memory);
  }
  machine.body = &body;
  for (int i = 0; i < 3; ++i) machine.index.blocks[i] = grid[i];
  int64_t (&block)[3] = machine.index.block;
  for (block[2] = 0; block[2] < grid[2]; ++block[2])
    for (block[1] = 0; block[1] < grid[1]; ++block[1])
      for (block[0] = 0; block[0] < grid[0]; ++block[0]) {
        start_block(threads, shared_bytes);
        run_block();
        if (!machine.error.empty()) return machine.error.c_str();
      }
  return nullptr;
}

void sync_threads() {
  self().state = State::kAtBarrier;
  self().place = nullptr;
  to_scheduler();
}

void sync_group(int group, int threads) {
  const int me = machine.index.thread, first = group * threads;
  if (machine.group_size == 0) {
    machine.group_size = threads;
    machine.group_barriers.assign(static_cast<size_t>((machine.index.threads + threads - 1) / threads), 0);
  }
  if (threads != machine.group_size || threads % 32 != 0) fail("groups of whole warps, all of one size");
  if (me < first || me >= first + threads) fail("a thread waits with another group than its own");
  self().state = State::kAtGroupBarrier;
  self().place = nullptr;
  for (int i = first; i < first + threads; ++i)
    if (machine.threads[static_cast<size_t>(i)].state != State::kAtGroupBarrier) return to_scheduler();
  ++machine.group_barriers[static_cast<size_t>(group)];
  for (int i = first; i < first + threads; ++i) machine.threads[static_cast<size_t>(i)].state = State::kRunnable;
  for (int w = first / 32; w < (first + threads) / 32; ++w) flush(machine.warps[static_cast<size_t>(w)], w * 32);
}

void collective(const char* place, void* mine, const std::function<void(void* const*)>& all) {
  static char nothing;
  Thread& me = self();
  me.state = State::kAtCollective;
  me.place = place;
  me.mine = mine != nullptr ? mine : &nothing;
  const int first = warp_of(machine.index.thread) * 32;
  Warp& warp = machine.warps[static_cast<size_t>(first / 32)];
  if (++warp.arrived < 32) return to_scheduler();
  warp.arrived = 0;
  void* lanes[32];
  for (int i = 0; i < 32; ++i) {
    Thread& t = machine.threads[static_cast<size_t>(first + i)];
    if (t.place != place) fail("lanes of a warp meet at different places: " + std::string(t.place) + " and " + place);
    lanes[i] = t.mine;
  }
  for (int i = first; i < first + 32; ++i) machine.threads[static_cast<size_t>(i)].state = State::kRunnable;
  ++warp.meetings;
  flush(warp, first);
  all(lanes);  // this lane continues immediately, the others when they are scheduled
}

void* shared_read(uint32_t address, int bytes) {
  check_range(address, bytes, "read");
  each_cell(address, bytes, note_read);
  record(kSharedLoad, address, bytes);
  return machine.shared.get() + address;
}

void shared_write(uint32_t address, const void* from, int bytes) {
  check_range(address, bytes, "write");
  each_cell(address, bytes, note_write);
  record(kSharedStore, address, bytes);
  std::memcpy(machine.shared.get() + address, from, static_cast<size_t>(bytes));
}

void global_read(const void* p, int bytes) {
  if (reinterpret_cast<uint64_t>(p) % static_cast<uint64_t>(bytes) != 0) fail("misaligned read of global memory");
  record(kGlobalLoad, reinterpret_cast<uint64_t>(p), bytes);
}
void global_write(const void* p, int bytes) {
  if (reinterpret_cast<uint64_t>(p) % static_cast<uint64_t>(bytes) != 0) fail("misaligned write of global memory");
  record(kGlobalStore, reinterpret_cast<uint64_t>(p), bytes);
}

void cp_async(uint32_t to, const void* from) {
  check_range(to, 16, "cp.async");
  global_read(from, 16);
  record(kSharedStore, to, 16);
  each_cell(to, 16, [](Cell& cell, uint32_t address) {
    note_write(cell, address);
    cell.pending = true;
  });
  std::memset(machine.shared.get() + to, kPoison, 16);
  self().open.push_back({to, from});
}

void cp_async_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void cp_async_wait(int pending) {
  auto& groups = self().groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace qlora::simt
