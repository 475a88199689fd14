// Two weights by one lookup: a table of all 256 bytes in shared memory, copied so often that every lane reads a bank of
// its own. 32 KiB, no bank conflicts; three instructions for two weights (extract the byte, form the address, load)
// where selecting in registers by prmt takes 5.25 (docs/kernels.md).
#pragma once

#include "cuda/device/elements.cuh"

namespace qlora::cuda {

inline constexpr int kPairTableBytes = 32 * 1024;
inline constexpr int kPairTableRow = 128;  // bytes of one entry with all its copies: 32 banks

// Pairs of levels in 16 bit, 32 copies. The levels are multiplied by level_multiplier() first: its reciprocal belongs
// into the scale.
template <class T>
class LevelPairs {
 public:
  QLORA_METHOD explicit LevelPairs(SharedAddress base) : mine_(base + ptx::lane() * 4) {}

  // All threads; a barrier has to follow.
  QLORA_METHOD static void fill(SharedAddress base, int quant_type, float multiplier) {
    const float level = ptx::load(&kTables.levels[quant_type][ptx::lane() & 15]) * multiplier;
    for (int i = ptx::thread(); i < kPairTableBytes / 16; i += ptx::threads()) {
      const int byte = i / 8;
      const uint32_t pair = ptx::pack<T>(ptx::shuffle(level, byte >> 4), ptx::shuffle(level, byte & 15));
      ptx::store_shared(base + i * 16, Words4{pair, pair, pair, pair});
    }
  }

  // The even element (high nibble) in the lower half.
  template <int kByte>
  QLORA_METHOD uint32_t at(uint32_t word) const {
    return ptx::load_shared<uint32_t>(mine_ + ptx::byte_of<kByte>(word) * kPairTableRow);
  }

 private:
  SharedAddress mine_;
};

// Pairs of levels in float32, 16 copies (half a warp reads 8 bytes a lane at a time).
class ValuePairs {
 public:
  QLORA_METHOD explicit ValuePairs(SharedAddress base) : mine_(base + (ptx::lane() & 15) * 8) {}

  QLORA_METHOD static void fill(SharedAddress base, int quant_type) {
    const float level = ptx::load(&kTables.levels[quant_type][ptx::lane() & 15]);
    for (int i = ptx::thread(); i < kPairTableBytes / 16; i += ptx::threads()) {
      const int byte = i / 8;
      const uint32_t even = bits_of(ptx::shuffle(level, byte >> 4)), odd = bits_of(ptx::shuffle(level, byte & 15));
      ptx::store_shared(base + i * 16, Words4{even, odd, even, odd});
    }
  }

  template <int kByte>
  QLORA_METHOD Floats2 at(uint32_t word) const {
    return ptx::load_shared<Floats2>(mine_ + ptx::byte_of<kByte>(word) * kPairTableRow);
  }

 private:
  SharedAddress mine_;
};

}  // namespace qlora::cuda
