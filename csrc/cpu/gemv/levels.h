// The levels of a chunk of 8 * kLanes packed weights, in the order in which an instruction set unpacks them best. The
// tokens are packed in the same order (pack_words), so no weight has to be moved.
//
// A type of levels has, besides a constructor:
//   element(j, lane)     the weight of the chunk that lane `lane` of vector j (0 … 7) holds. It lies in word `lane` of
//                        the chunk, or in another word of the same 32 weights, which has the same scale.
//   for_each(words, fn)  calls fn(j, levels) for each vector
//   kMultiplied          whether the levels are rounded to bfloat16, times level_multiplier()
#pragma once

#include "cpu/isa/table.h"

namespace qlora::cpu {
namespace {

// The nibble j of all words at once: a shift and a lookup of the whole level for each vector.
template <class V>
struct NibbleLevels {
  static constexpr bool kMultiplied = false;
  typename V::Table table;

  explicit NibbleLevels(QuantType quant_type) : table(V::table(codebook(quant_type))) {}
  static constexpr int64_t element(int j, int lane) { return 8 * lane + element_of_nibble(j); }
  template <int kFirst = 0, class Fn>
  __attribute__((always_inline)) void for_each(typename V::I words, const Fn& fn) const {
    if constexpr (kFirst < 8) {
      fn(kFirst, V::template lookup<kFirst>(table, words));
      for_each<kFirst + 1>(words, fn);
    }
  }
};

// Calls fn with the levels that multiply tokens of this dtype.
template <class V, class Fn>
void with_levels(QuantType quant_type, DType tokens, const Fn& fn) {
  if constexpr (V::kHasBytePlanes) {
    if (tokens == DType::kBFloat16) return fn(typename V::template ByteLevels<2>(quant_type));
    if constexpr (V::kExactByPlanes) return fn(typename V::template ByteLevels<4>(quant_type));
  }
  fn(NibbleLevels<V>(quant_type));
}

}  // namespace
}  // namespace qlora::cpu
