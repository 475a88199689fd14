// Backward of the input: dx = dy W + low-rank term on the tensor cores, one accumulator, W decoded on the way.
//
// The reduction runs over out features, so a scale cannot wait for the accumulators: weights are decoded to float32,
// scaled and rounded once, which gives exactly the weights that torch would multiply with. Packed rows are read as they
// lie: a byte holds two in features of one row, the operand wants two rows of one in feature, and the rounding
// instruction, which takes two floats, pairs them for nothing.
#include "cuda/device/launch.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/results.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace gemm_dx {

constexpr int kWarps = 4;  // side by side: each decodes 32 in features, for all tokens of the tile
constexpr int kThreads = 32 * kWarps;
constexpr int kFeatures = 32 * kWarps;  // in features of a block
constexpr int kChunk = 64;              // out features at a time
constexpr int kStages = 2;
constexpr int kWeightStageBytes = kChunk * kFeatures / 2;
constexpr int kScaleStageBytes = kWarps * kChunk * 4;

template <int kTokens>
constexpr int kSharedBytes = kPairTableBytes + TokenTile<kTokens, kStages, kThreads>::kBytes +
                             kStages * kWeightStageBytes + 2 * kScaleStageBytes;

// The packed tile of a chunk: 64 rows of 64 bytes, four pieces of 16, piece c for warp c. Pieces are exchanged between
// groups of 16 rows, so that the four rows that a warp reads together lie in different banks.
class WeightTile {
 public:
  QLORA_METHOD WeightTile(SharedAddress base, const Weight& w, int64_t first_feature)
      : base_(base),
        stage_(base),
        rows_left_(static_cast<int>(w.n)),
        chunks_left_(static_cast<int>(ceil_div(w.n, kChunk))) {
    const int row = ptx::thread() / 4, piece = ptx::thread() % 4;
    inside_ = first_feature + piece * 32 < w.k;
    from_ = w.packed + (row * w.k + first_feature) / 2 + piece * 16;
    half_bytes_ = 32 * w.k / 2;
    rows_left_ -= row;
    // Rows r and r + 32 differ in bit 1 of r / 16.
    to_ = row * 64 + (piece ^ row / 16) * 16;
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    mine_ = t * 16 * 64 + (ptx::warp() ^ t) * 16 + 2 * g;
  }

  // Starts the copy of the next chunk, if there is one; rows that are not there are skipped.
  QLORA_METHOD void fetch() {
    if (chunks_left_-- > 0) {
      copy(stage_ + to_, from_, rows_left_ > 0);
      copy(stage_ + (to_ ^ 32u) + 32 * 64, from_ + half_bytes_, rows_left_ > 32);
      from_ += 2 * half_bytes_;
      rows_left_ -= kChunk;
    }
    stage_ = stage_ + kWeightStageBytes == base_ + kStages * kWeightStageBytes ? base_ : stage_ + kWeightStageBytes;
  }

  // Where the lane finds the two bytes (four in features, 4g …) of its rows 16t … 16t + 15 of the chunk to read now, 64
  // bytes from row to row.
  QLORA_METHOD SharedAddress current() const { return stage_ + mine_; }

 private:
  QLORA_METHOD void copy(SharedAddress to, const uint8_t* from, bool row_exists) const {
    if (row_exists && inside_)
      ptx::cp_async_16(to, from);
    else  // any weight will do: its gradient is zero, or its result is not stored
      ptx::store_shared(to, Words4{0, 0, 0, 0});
  }
  SharedAddress base_, to_, mine_;
  SharedAddress stage_;  // filled next; behind fetch(), the one to be read
  int rows_left_, chunks_left_;
  bool inside_;
  const uint8_t* from_;
  int64_t half_bytes_;
};

// Scales of the chunk's 64 rows for each warp's in features, one chunk ahead in two buffers. A thread decodes the scale
// of one row for a pair of warps, or one for each of the two where a block of scales may end between them.
class ScaleTile {
 public:
  QLORA_METHOD ScaleTile(SharedAddress base, const Weight& w, int64_t first_feature)
      : base_(base),
        shift_(w.block_shift),
        shared_(w.block_shift > 5 && w.k % 64 == 0),
        row_(ptx::thread() % kChunk),
        k_(w.k),
        last_row_(w.n - 1) {
    const int pair = ptx::thread() / kChunk;
    for (int i = 0; i < 2; ++i) feature_[i] = min_i64(first_feature + (2 * pair + i) * 32, w.k - 32);
    to_ = 2 * pair * kChunk * 4 + slot(static_cast<int>(row_)) * 4;
  }

  // The scales of the next chunk, into the buffer that is not being read.
  QLORA_METHOD void fill(const Weight& w, const WarpScales& scales, int buffer) {
    const int64_t row = min_i64(row_, last_row_) * k_;
    const SharedAddress to = base_ + buffer * kScaleStageBytes + to_;
    const float first = scales.of_block(w, (row + feature_[0]) >> shift_);
    const float second = shared_ ? first : scales.of_block(w, (row + feature_[1]) >> shift_);
    ptx::store_shared(to, first);
    ptx::store_shared(to + kChunk * 4, second);
    row_ += kChunk;
  }

  // Scales of rows 16t + 4s … 16t + 4s + 3.
  QLORA_METHOD Floats4 at(int buffer, int step) const {
    const int t = ptx::lane() % 4;
    const SharedAddress mine = base_ + buffer * kScaleStageBytes + (ptx::warp() * kChunk + slot(16 * t)) * 4;
    return ptx::load_shared<Floats4>(mine ^ (16u * static_cast<uint32_t>(step)));
  }

 private:
  // Rows 32 … 63 have neighbouring groups of four exchanged: lanes t = 0 … 3 read four different groups of banks.
  static QLORA_METHOD int slot(int row) { return row ^ (row >> 5 << 2); }

  SharedAddress base_, to_;
  int shift_;
  bool shared_;
  int64_t row_, k_, last_row_;
  int64_t feature_[2];
};

// Four rows times four in features of a lane, scaled and rounded: the fragments of in features 4g + {0, 1} and {2, 3}.
template <class T>
QLORA_DEVICE void decode_rows(const ValuePairs& pairs, const uint32_t (&bytes)[4], const Floats4& scale,
                              uint32_t (&first)[4], uint32_t (&second)[4]) {
  const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
  float even[2][4], odd[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Floats2 low = pairs.at<0>(bytes[i]), high = pairs.at<1>(bytes[i]);
    even[0][i] = low.x * scales[i];
    odd[0][i] = low.y * scales[i];
    even[1][i] = high.x * scales[i];
    odd[1][i] = high.y * scales[i];
  }
  first[0] = ptx::pack<T>(even[0][0], even[0][1]);
  first[1] = ptx::pack<T>(odd[0][0], odd[0][1]);
  first[2] = ptx::pack<T>(even[0][2], even[0][3]);
  first[3] = ptx::pack<T>(odd[0][2], odd[0][3]);
  second[0] = ptx::pack<T>(even[1][0], even[1][1]);
  second[1] = ptx::pack<T>(odd[1][0], odd[1][1]);
  second[2] = ptx::pack<T>(even[1][2], even[1][3]);
  second[3] = ptx::pack<T>(odd[1][2], odd[1][3]);
}

template <class T, int kTokens, bool kMulti>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS GemmDxParams p) {
  if (!ptx::can_run<T>(kSharedBytes<kTokens>)) return;
  using Tile = TokenTile<kTokens, kStages, kThreads>;
  const SharedAddress table = ptx::shared_base();
  const int block_feature = ptx::block_y() * kFeatures;  // 32 bits hold a feature and a token, not an element
  const int first_feature = block_feature + ptx::warp() * 32;
  const int first_token = ptx::block_x() * kTokens;
  const int chunks = static_cast<int>(ceil_div(p.weight.n, kChunk));

  const SharedAddress weight_base = table + kPairTableBytes + Tile::kBytes;
  WeightTile weights(weight_base, p.weight, block_feature);
  Tile tokens(table + kPairTableBytes, p.dy, p.out.m, p.weight.n, p.weight.n, first_token);
  const auto fetch = [&] {
    weights.fetch();
    tokens.fetch();
  };
  start_pipeline<kStages>(fetch);
  ValuePairs::fill<kThreads>(table, p.weight.quant_type);
  const ValuePairs pairs(table);
  const WarpScales scales(p.weight);
  ScaleTile scale_tile(weight_base + kStages * kWeightStageBytes, p.weight, block_feature);
  scale_tile.fill(p.weight, scales, 0);

  float sum[2][kTokens / 8][4] = {};

  for (int chunk = 0; chunk < chunks; ++chunk) {
    advance_pipeline<kStages>(fetch);
    const SharedAddress bytes_at = weights.current();
    uint32_t fragment[4][2][4];
    unroll<4>([&](auto step) {
      constexpr int s = decltype(step)::value;
      const uint32_t bytes[4] = {ptx::load_shared<uint16_t, (4 * s + 0) * 64>(bytes_at),
                                 ptx::load_shared<uint16_t, (4 * s + 1) * 64>(bytes_at),
                                 ptx::load_shared<uint16_t, (4 * s + 2) * 64>(bytes_at),
                                 ptx::load_shared<uint16_t, (4 * s + 3) * 64>(bytes_at)};
      decode_rows<T>(pairs, bytes, scale_tile.at(chunk % 2, s), fragment[s][0], fragment[s][1]);
    });
    const auto place = place_in(tokens.current());
    unroll<kTokens / 8>([&](auto group) {
      constexpr int j = decltype(group)::value;
      uint32_t dy[8];
      load_fragment<j>(place, dy);
#pragma unroll
      for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int f = 0; f < 2; ++f) ptx::mma<T>(sum[f][j], fragment[s][f], dy[2 * s], dy[2 * s + 1], sum[f][j]);
    });
    if (chunk + 1 < chunks) scale_tile.fill(p.weight, scales, (chunk + 1) % 2);
  }
  ptx::cp_async_wait<0>();
  if constexpr (kMulti)
    low_rank_steps_of_adapters<T, 2, kTokens>(p.out, first_feature, first_token, sum);
  else
    low_rank_steps<T, 2, kTokens>(p.out, first_feature, first_token, sum);
  store_results<T, 2, kTokens, kMulti>(p.out, first_feature, first_token, sum);
}

template <class T, int kTokens>
Status launch_tile(const GemmDxParams& p, cudaStream_t stream) {
  const Grid grid{ceil_div(p.out.m, kTokens), ceil_div(p.weight.k, kFeatures)};
  const auto kernel_of_call = p.out.adapter_of_token != nullptr ? kernel<T, kTokens, true> : kernel<T, kTokens, false>;
  return start(kernel_of_call, grid, kThreads, kSharedBytes<kTokens>, stream, p);
}

template <class T>
Status launch_typed(const GemmDxParams& p, cudaStream_t stream) {
  return p.tokens_per_block == 128 ? launch_tile<T, 128>(p, stream) : launch_tile<T, 64>(p, stream);
}

}  // namespace gemm_dx

Status launch_gemm_dx(const GemmDxParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? gemm_dx::launch_typed<bf16>(p, stream) : gemm_dx::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
