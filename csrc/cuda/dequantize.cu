// 4 bit back to dense, double-quantized scales decoded on the way: one launch, each weight rounded once. A lane decodes
// the eight weights of a word; a warp takes four words a lane at a time, so that one decode of scales serves 1024
// weights.
#include "cuda/device/launch.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"

namespace qlora::cuda {
namespace dequantize {

constexpr int kThreads = 256;
constexpr int kWords = 4;                   // words of a lane in one round
constexpr int kPerRound = 32 * 8 * kWords;  // weights of a warp in one round
constexpr int kRounds = 8;                  // rounds of a warp: 8192 weights pay for their share of the table
static_assert(kPerRound >> 5 <= 32, "one lane for each block of a round");

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
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 3) kernel(QLORA_PARAMS DequantizeParams p) {
  const SharedAddress table = ptx::shared_base();
  ValuePairs::fill<kThreads>(table, p.weight.quant_type);
  const WarpScales scales(p.weight);
  ptx::sync_threads();
  const ValuePairs pairs(table);
  const int64_t warp = static_cast<int64_t>(ptx::block_x()) * (kThreads / 32) + ptx::warp();
  const int64_t parts = ceil_div(p.row_elems, kPerRound), rounds = parts * p.rows;

  for (int64_t round = warp * kRounds; round < (warp + 1) * kRounds && round < rounds; ++round) {
    const int64_t row = p.rows == 1 ? 0 : divide(round, parts), part = round - row * parts;
    const int64_t row_begin = p.first + row * p.row_stride, begin = row_begin + part * kPerRound;
    const int64_t end = row_begin + p.row_elems, last_block = (end - 1) >> p.weight.block_shift;
    T* out = static_cast<T*>(p.out) + row * p.row_elems;
    const int64_t first_block = begin >> p.weight.block_shift;
    const float mine = scales.of_block(p.weight, min_i64(first_block + ptx::lane(), last_block));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int64_t element = begin + i * 256 + ptx::lane() * 8;
      const float scale = ptx::shuffle(mine, static_cast<int>((element >> p.weight.block_shift) - first_block) & 31);
      if (element + 8 <= end) {
        const uint32_t word = ptx::load_once(reinterpret_cast<const uint32_t*>(p.weight.packed + element / 2));
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
