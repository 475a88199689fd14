// Dequantizes a 4-bit weight, including double-quantized scales, in one launch; each weight is rounded once. A lane
// handles words of eight weights. A warp handles four words per lane in a round, so it computes its scales once for
// 1024 weights.
#include "cuda/device/launch.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"

namespace qlora::cuda {
namespace dequantize {

constexpr int kThreads = 256;
constexpr int kWords = 4;                   // words of a lane in one round
constexpr int kPerRound = 32 * 8 * kWords;  // weights of a warp in one round
constexpr int kRounds = 4;                  // rounds of a warp: 4096 weights amortize its share of the table
static_assert(kPerRound >> 5 <= 32, "one lane for each block of a round");

// Row and part of a round. The rounds of a warp are consecutive, so only the first one needs a division.
class Place {
 public:
  QLORA_METHOD Place(const DequantizeParams& p, int64_t round, int64_t parts) : parts_(parts) {
    row_ = p.rows == 1 ? 0 : divide(round, parts);
    part_ = round - row_ * parts;
  }
  QLORA_METHOD void next() {
    if (++part_ < parts_) return;
    part_ = 0;
    ++row_;
  }
  QLORA_METHOD int64_t row() const { return row_; }
  QLORA_METHOD int64_t row_begin(const DequantizeParams& p) const { return p.first + row_ * p.row_stride; }
  QLORA_METHOD int64_t begin(const DequantizeParams& p) const { return row_begin(p) + part_ * kPerRound; }

 private:
  int64_t parts_, row_, part_;
};

// The data that a lane loads for a round: its words, and the scale of one block.
struct Raw {
  uint32_t word[kWords];
  RawScale scale;
};
template <class T>
QLORA_DEVICE void store_eight(T* out, const float (&v)[8]) {
  if constexpr (sizeof(T) == 4) {
    ptx::store(reinterpret_cast<Floats4*>(out), Floats4{v[0], v[1], v[2], v[3]});
    ptx::store(reinterpret_cast<Floats4*>(out) + 1, Floats4{v[4], v[5], v[6], v[7]});
  } else {
    ptx::store(reinterpret_cast<Words4*>(out), Words4{ptx::pack<T>(v[0], v[1]), ptx::pack<T>(v[2], v[3]),
                                                      ptx::pack<T>(v[4], v[5]), ptx::pack<T>(v[6], v[7])});
  }
}

template <class T>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS DequantizeParams p) {
  const int64_t warp = static_cast<int64_t>(ptx::block_x()) * (kThreads / 32) + ptx::warp();
  const int64_t parts = ceil_div(p.row_elems, kPerRound), rounds = parts * p.rows;
  const WarpScales scales(p.weight);
  int left = static_cast<int>(min_i64(kRounds, rounds - warp * kRounds));
  Place loading(p, warp * kRounds, parts);
  // Issues all loads of a round together, one round ahead, so that they overlap.
  const auto load = [&](Raw& raw) {
    const int64_t begin = loading.begin(p), end = loading.row_begin(p) + p.row_elems;
    const int64_t last_block = (end - 1) >> p.weight.block_shift;
    raw.scale = scales.load(p.weight, min_i64((begin >> p.weight.block_shift) + ptx::lane(), last_block));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int64_t element = begin + i * 256 + ptx::lane() * 8;
      if (element + 8 <= end)
        raw.word[i] = ptx::load_once(reinterpret_cast<const uint32_t*>(p.weight.packed + element / 2));
    }
    loading.next();
  };
  Place place = loading;
  Raw ahead{};
  if (left > 0) load(ahead);

  const SharedAddress table = ptx::shared_base();
  ValuePairs::fill<kThreads>(table, p.weight.quant_type);
  ptx::sync_threads();
  const ValuePairs pairs(table);
  for (; left > 0; --left, place.next()) {
    const Raw raw = ahead;
    if (left > 1) load(ahead);
    const int64_t row_begin = place.row_begin(p), begin = place.begin(p), end = row_begin + p.row_elems;
    T* out = static_cast<T*>(p.out) + place.row() * p.row_elems;
    const int64_t first_block = begin >> p.weight.block_shift;
    const float mine = scales.value(raw.scale);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int64_t element = begin + i * 256 + ptx::lane() * 8;
      const float scale = ptx::shuffle(mine, static_cast<int>((element >> p.weight.block_shift) - first_block) & 31);
      if (element + 8 <= end) {
        const uint32_t word = raw.word[i];
        const Floats2 a = pairs.at<0>(word), b = pairs.at<1>(word), c = pairs.at<2>(word), d = pairs.at<3>(word);
        const float v[8] = {a.x * scale, a.y * scale, b.x * scale, b.y * scale,
                            c.x * scale, c.y * scale, d.x * scale, d.y * scale};
        store_eight(out + (element - row_begin), v);
      } else {
        for (int64_t e = element; e < end; ++e) store_element(out, p.dtype, e - row_begin, weight_at(p.weight, e));
      }
    }
  }
}

}  // namespace dequantize

Status launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  using namespace dequantize;
  if (p.first % kMinBlockSize != 0 || (p.rows > 1 && (p.row_elems | p.row_stride) % kMinBlockSize != 0))
    return {"a panel begins inside a group of 32 elements"};
  const int64_t rounds = p.rows * ceil_div(p.row_elems, kPerRound);
  const Grid grid{ceil_div(rounds, int64_t{kRounds} * (kThreads / 32))};
  const auto kernel_of_type = p.dtype == DType::kBFloat16  ? kernel<bf16>
                              : p.dtype == DType::kFloat16 ? kernel<fp16>
                                                           : kernel<float>;
  return start(kernel_of_type, grid, kThreads, kPairTableBytes, stream, p);
}

}  // namespace qlora::cuda
