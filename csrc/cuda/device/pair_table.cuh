// Two weights by one lookup: a table of all 256 bytes in shared memory, copied so often that every lane reads a bank of
// its own. 32 KiB, no bank conflicts; three instructions for two weights (extract the byte, form the address, load)
// where selecting in registers by prmt takes 5.25 (docs/kernels.md).
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

inline constexpr int kPairTableBytes = 32 * 1024;
inline constexpr int kPairTableRow = 128;  // bytes of one entry with all its copies: 32 banks

// Writes the table with all threads of a block: pair(even level, odd level) gives the two words that alternate in an
// entry. A thread's odd level (low nibble) is the same in all its entries.
template <int kThreads, class Pair>
QLORA_DEVICE void fill_pairs(SharedAddress base, float level, const Pair& pair) {
  static_assert(kThreads % 128 == 0, "a thread keeps its low nibble");
  const float odd = ptx::shuffle(level, ptx::thread() / 8 % 16);
  const SharedAddress mine = base + ptx::thread() * 16;
#pragma unroll
  for (int i = 0; i < kPairTableBytes / 16 / kThreads; ++i) {
    const float even = ptx::shuffle(level, i * (kThreads / 128) + ptx::thread() / 128);
    const Words2 words = pair(even, odd);
    ptx::store_shared(mine + i * kThreads * 16, Words4{words.x, words.y, words.x, words.y});
  }
}

// Pairs of levels in 16 bit, 32 copies. The levels are multiplied by level_multiplier() first: its reciprocal belongs
// into the scale.
template <class T>
class LevelPairs {
 public:
  QLORA_METHOD explicit LevelPairs(SharedAddress base) : mine_(base + ptx::lane() * 4) {}

  // All threads; a barrier has to follow.
  template <int kThreads>
  QLORA_METHOD static void fill(SharedAddress base, int quant_type, float multiplier) {
    const float level = ptx::load(&kTables.levels[quant_type][ptx::lane() & 15]) * multiplier;
    fill_pairs<kThreads>(base, level, [](float even, float odd) {
      const uint32_t pair = ptx::pack<T>(even, odd);
      return Words2{pair, pair};
    });
  }

  // The even element (high nibble) in the lower half.
  template <int kByte>
  QLORA_METHOD uint32_t at(uint32_t word) const {
    return ptx::load_shared<uint32_t>(ptx::mad<kPairTableRow>(ptx::byte_of<kByte>(word), mine_));
  }

 private:
  SharedAddress mine_;
};

// Pairs of levels in float32, 16 copies (half a warp reads 8 bytes a lane at a time).
class ValuePairs {
 public:
  QLORA_METHOD explicit ValuePairs(SharedAddress base) : mine_(base + (ptx::lane() & 15) * 8) {}

  template <int kThreads>
  QLORA_METHOD static void fill(SharedAddress base, int quant_type) {
    const float level = ptx::load(&kTables.levels[quant_type][ptx::lane() & 15]);
    fill_pairs<kThreads>(base, level, [](float even, float odd) { return Words2{bits_of(even), bits_of(odd)}; });
  }

  template <int kByte>
  QLORA_METHOD Floats2 at(uint32_t word) const {
    return ptx::load_shared<Floats2>(ptx::mad<kPairTableRow>(ptx::byte_of<kByte>(word), mine_));
  }

 private:
  SharedAddress mine_;
};

}  // namespace qlora::cuda
