// Unpacks two weights with one lookup in a table of all 256 byte values in shared memory, replicated so that every lane
// reads its own bank: 32 KiB, no bank conflicts. Two weights take three instructions (extract the byte, compute the
// address, load); selecting them in registers with prmt takes 5.25 (docs/notes/cuda-kernels.md).
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

inline constexpr int kPairTableBytes = 32 * 1024;
inline constexpr int kPairTableRow = 128;  // bytes of all copies of one entry, one in each of the 32 banks

// Writes the table; all threads of a block must call it. pair(even level, odd level) returns the two words that
// alternate in an entry. The odd level (low nibble) of a thread is the same in all its entries.
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

// Table of pairs of 16-bit levels in 32 copies. Levels are multiplied by level_multiplier() before rounding, so scales
// must be multiplied by its reciprocal.
template <class T>
class LevelPairs {
 public:
  QLORA_METHOD explicit LevelPairs(SharedAddress base) : mine_(base + ptx::lane() * 4) {}

  // All threads must call it, then pass a barrier.
  template <int kThreads>
  QLORA_METHOD static void fill(SharedAddress base, QuantType quant_type, float multiplier) {
    const float level = ptx::load(&kTables.levels[static_cast<int>(quant_type)][ptx::lane() & 15]) * multiplier;
    fill_pairs<kThreads>(base, level, [](float even, float odd) {
      const uint32_t pair = ptx::pack<T>(even, odd);
      return Words2{pair, pair};
    });
  }

  // The levels of byte kByte; the even element (high nibble) is in the lower half.
  template <int kByte>
  QLORA_METHOD uint32_t at(uint32_t word) const {
    return ptx::load_shared<uint32_t>(ptx::mad<kPairTableRow>(ptx::byte_of<kByte>(word), mine_));
  }

 private:
  SharedAddress mine_;
};

// Table of pairs of float32 levels in 16 copies, because half a warp at a time reads 8 bytes per lane.
class ValuePairs {
 public:
  QLORA_METHOD explicit ValuePairs(SharedAddress base) : mine_(base + (ptx::lane() & 15) * 8) {}

  template <int kThreads>
  QLORA_METHOD static void fill(SharedAddress base, QuantType quant_type) {
    const float level = ptx::load(&kTables.levels[static_cast<int>(quant_type)][ptx::lane() & 15]);
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
