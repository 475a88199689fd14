// Blockwise 4-bit quantization: finds absmax, normalises, finds codes, packs them. A lane takes eight weights, so it
// loads 16 or 32 bytes and stores one word. A quantization block of 64 belongs to eight lanes, which find its absmax by
// shuffles.
#include "cuda/device/codes.cuh"
#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"
#include "format/nf4_cells.h"

namespace qlora::cuda {
namespace quantize {

constexpr int kThreads = 256;
constexpr int kPerLane = 8;
constexpr int kPerWarp = 32 * kPerLane;
constexpr int kRounds = 4;  // rounds of a warp, to amortize its start-up

// Loads eight adjacent weights; zeros beyond the end.
template <class T>
QLORA_DEVICE void load_eight(const T* weight, int64_t first, int64_t numel, float (&x)[kPerLane]) {
  if (first + kPerLane <= numel) {
    constexpr int kWords = kPerLane * static_cast<int>(sizeof(T)) / 16;
    Words4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = ptx::load(reinterpret_cast<const Words4*>(weight + first) + i);
    const uint32_t flat[8] = {words[0].x,          words[0].y,          words[0].z,          words[0].w,
                              words[kWords - 1].x, words[kWords - 1].y, words[kWords - 1].z, words[kWords - 1].w};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if constexpr (sizeof(T) == 4)
        x[i] = float_of(flat[i]);
      else
        x[i] = ptx::unpack<T>(flat[i / 2], i % 2);
    }
  } else {
    for (int i = 0; i < kPerLane; ++i) x[i] = first + i < numel ? load_as_float(weight + first + i) : 0.0f;
  }
}

// The table of NF4 cells in shared memory, in 16 copies, so that every lane of a half warp reads its own banks.
constexpr int kCellBytes = 16 * 8;
constexpr int kTableBytes = kNf4Cells * kCellBytes;
QLORA_TABLE Nf4CellTable kCellTable = kNf4CellTable;

// All threads must call it, then pass a barrier.
QLORA_DEVICE void fill_cells() {
  static_assert(kTableBytes == kThreads * 16, "16 bytes, two copies, for each thread");
  const int cell = ptx::thread() / 8;
  const uint32_t threshold = bits_of(ptx::load(&kCellTable.threshold[cell]));
  const auto code = static_cast<uint32_t>(ptx::load(&kCellTable.code[cell]));
  ptx::store_shared(ptx::shared_base() + ptx::thread() * 16, Words4{threshold, code, threshold, code});
}

template <QuantType kType>
QLORA_DEVICE uint32_t code_of(float x) {
  if constexpr (kType == QuantType::kNf4) {
    // A nan falls into the first cell and gets code 0.
    const uint32_t cell = bits_of(fmaf(fmaxf(x, -1.0f), kNf4CellsPerUnit, kNf4CellMagic)) - bits_of(0x1.8p23f);
    const auto entry = ptx::load_shared<Words2>(
        ptx::mad<kCellBytes>(cell, ptx::shared_base() + static_cast<SharedAddress>(ptx::lane() & 15) * 8));
    return entry.y + (x > float_of(entry.x) ? 1u : 0u);
  } else {
    return code_by_thresholds<kType>(x);
  }
}

// The largest magnitude of a lane's eight weights and `before`. A nan is ignored; inf is kept.
QLORA_DEVICE float absmax_of(const float (&x)[kPerLane], float before) {
  float largest = before;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

template <class T>
QLORA_DEVICE void check_finite(const QuantizeParams& p, const float (&x)[kPerLane], int64_t first) {
  float probe = 0.0f;  // x * 0 is nan if x is nan or inf, and a nan stays in the sum
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) probe = fmaf(x[i], 0.0f, probe);
  if (probe == 0.0f) return;
  for (int i = 0; i < kPerLane; ++i) {
    if ((bits_of(x[i]) & 0x7F800000u) != 0x7F800000u) continue;
    report_position(p.bad, first + i);
    return;
  }
}

// Quantizes `count` weights from `begin` on with one warp: several blocks of `lanes` lanes each, or one block of at
// least 256 weights.
template <class T, QuantType kType>
QLORA_DEVICE void quantize_run(const QuantizeParams& p, int64_t begin, int count, int lanes) {
  const T* weight = static_cast<const T*>(p.weight);
  float x[kPerLane];
  float absmax = 0.0f;
  for (int64_t first = begin; first < begin + count && first < p.numel; first += kPerWarp) {
    load_eight(weight, first + ptx::lane() * kPerLane, p.numel, x);
    if (p.check_finite) check_finite<T>(p, x, first + ptx::lane() * kPerLane);
    absmax = absmax_of(x, absmax);
  }
  for (int mask = 1; mask < lanes; mask *= 2) absmax = fmaxf(absmax, ptx::shuffle_xor(absmax, mask));
  const int64_t my_first = begin + ptx::lane() * kPerLane;
  if (ptx::lane() % lanes == 0 && my_first < p.numel) {
    ptx::store(p.absmax + (my_first >> p.block_shift), absmax);
    if (!p.check_finite && (bits_of(absmax) & 0x7F800000u) == 0x7F800000u) report_position(p.bad, my_first);
  }

  const float reciprocal = 1.0f / absmax;
  const bool usable = (bits_of(reciprocal) & 0x7F800000u) != 0x7F800000u;  // false if absmax is zero or subnormal
  const float factor = usable ? reciprocal : 1.0f;
  for (int64_t first = begin; first < begin + count && first < p.numel; first += kPerWarp) {
    const int64_t mine = first + ptx::lane() * kPerLane;
    if (count > kPerWarp) load_eight(weight, mine, p.numel, x);
    if (!usable) {
      for (int i = 0; i < kPerLane; ++i) x[i] = absmax > 0.0f ? x[i] / absmax : 0.0f;
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) word |= code_of<kType>(x[i] * factor) << (4 * element_of_nibble(i));
    if (mine + kPerLane <= p.numel) {
      ptx::store(reinterpret_cast<uint32_t*>(p.packed + mine / 2), word);
    } else {
      for (int i = 0; mine + i < p.numel; i += 2) {
        const uint32_t byte = word >> (4 * i);
        // If the number of weights is odd, the unused nibble is zero.
        ptx::store(p.packed + (mine + i) / 2, static_cast<uint8_t>(mine + i + 1 < p.numel ? byte : byte & 0xF0u));
      }
    }
  }
}

template <class T, QuantType kType>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) kernel(QLORA_PARAMS QuantizeParams p) {
  if constexpr (kType == QuantType::kNf4) {
    fill_cells();
    ptx::sync_threads();
  }
  const int block = 1 << p.block_shift;
  const int lanes = block < kPerWarp ? block / kPerLane : 32;
  const int count = block < kPerWarp ? kPerWarp : block;
  const int64_t warp = static_cast<int64_t>(ptx::block_x()) * (kThreads / 32) + ptx::warp();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t begin = (warp * kRounds + round) * count;
    if (begin >= p.numel) return;
    quantize_run<T, kType>(p, begin, count, lanes);
  }
}

template <class T>
Status launch_typed(const QuantizeParams& p, cudaStream_t stream) {
  const int64_t block = int64_t{1} << p.block_shift;
  const int64_t per_block = (block < kPerWarp ? kPerWarp : block) * (kThreads / 32) * kRounds;
  const auto kernel_of_type =
      visit_quant_type(p.quant_type, [](auto type) { return &kernel<T, decltype(type)::value>; });
  const int shared_bytes = p.quant_type == QuantType::kNf4 ? kTableBytes : 0;
  return start(kernel_of_type, {ceil_div(p.numel, per_block)}, kThreads, shared_bytes, stream, p);
}

}  // namespace quantize

Status launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return quantize::launch_typed<bf16>(p, stream);
    case DType::kFloat16:
      return quantize::launch_typed<fp16>(p, stream);
    default:
      return quantize::launch_typed<float>(p, stream);
  }
}

}  // namespace qlora::cuda
