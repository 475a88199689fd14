// Gradient of the input: dx = dy W + low-rank term on the tensor cores in one accumulator, with W unpacked in
// registers.
//
// The reduction runs over out features, so scales cannot be applied to accumulators. Instead, weights are unpacked to
// float32, scaled and rounded once, which gives exactly the weights that torch would multiply with. Packed rows are
// read as stored. A byte holds two in features of one row, but the operand needs pairs of rows of one in feature; the
// rounding instruction takes two floats and forms these pairs at no extra cost.
#include <type_traits>

#include "cuda/device/launch.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/results.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace gemm_dx {

constexpr int kChunk = 64;  // out features at a time
constexpr int kStages = 2;

// Each warp of a group unpacks 32 in features and multiplies them with all tokens of the tile. A group takes every
// kGroups-th chunk.
template <int kWarpsOfGroup, int kTokensOfTile, int kGroupsOfBlock>
struct Shape {
  static constexpr int kWarps = kWarpsOfGroup, kTokens = kTokensOfTile, kGroups = kGroupsOfBlock;
  static constexpr int kThreads = 32 * kWarps, kBlockThreads = kThreads * kGroups;
  static constexpr int kFeatures = 32 * kWarps;  // in features of a block
  using Tile = TokenTile<kTokens, kStages, kThreads, kGroups>;
  using Gathered = GatheredTile<kTokens, kStages, kThreads, kGroups>;
  using Group = Groups<kGroups, kThreads>;
  // A row of a chunk has 16 bytes per warp. The four rows that a warp reads together, 16 apart, lie in different banks:
  // with four pieces to a row by permuting the pieces, with two by padding.
  static constexpr int kRowBytes = 16 * kWarps, kPadding = kWarps == 2 ? 32 : 0;
  static constexpr int kWeightStageBytes = kChunk * kRowBytes + 4 * kPadding;
  static constexpr int kScaleStageBytes = kWarps * kChunk * 4;
  static constexpr int kGroupBytes = Tile::kBytes + kStages * kWeightStageBytes + 2 * kScaleStageBytes;
  static constexpr int kSharedBytes = kPairTableBytes + kGroups * kGroupBytes;
  static_assert(kWarps == 2 || kWarps == 4, "two or four pieces to a row");
  static_assert(Group::sum_bytes(kTokens) <= kSharedBytes, "the groups' sums find room");
};

// The packed bytes of a chunk: 64 rows with one piece of 16 bytes for each warp of the group.
template <class S>
class WeightTile {
 public:
  QLORA_METHOD WeightTile(SharedAddress base, const WeightView& w, int64_t first_feature)
      : base_(base),
        stage_(base),
        rows_left_(static_cast<int>(w.n) - S::Group::index() * kChunk),
        chunks_left_(static_cast<int>(ceil_div(w.n, kChunk)) - S::Group::index()) {
    const int row = S::Group::thread() / S::kWarps, piece = S::Group::thread() % S::kWarps;
    inside_ = first_feature + piece * 32 < w.k;
    from_ = w.packed + ((S::Group::index() * kChunk + row) * w.k + first_feature) / 2 + piece * 16;
    half_bytes_ = 32 * w.k / 2;
    rows_left_ -= row;
    to_ = at(row, piece);
    upper_to_ = at(row + 32, piece);
    const int g = ptx::lane() / 4, t = ptx::lane() % 4;
    mine_ = at(16 * t, S::Group::warp()) + 2 * g;
  }

  // Starts copying the group's next chunk, if there is one; rows beyond the end are filled with zero bytes.
  QLORA_METHOD void fetch() {
    if (chunks_left_ > 0) {
      copy(stage_ + to_, from_, rows_left_ > 0);
      copy(stage_ + upper_to_, from_ + half_bytes_, rows_left_ > 32);
      from_ += 2 * S::kGroups * half_bytes_;
      rows_left_ -= S::kGroups * kChunk;
    }
    chunks_left_ -= S::kGroups;
    stage_ =
        stage_ + S::kWeightStageBytes == base_ + kStages * S::kWeightStageBytes ? base_ : stage_ + S::kWeightStageBytes;
  }

  // The address of the lane's two bytes (in features 4g … 4g + 3) in row 16t of the chunk to read now; its rows are
  // 16t … 16t + 15, kRowBytes apart.
  QLORA_METHOD SharedAddress current() const { return stage_ + mine_; }

 private:
  static QLORA_METHOD int at(int row, int piece) {
    const int sixteen = row / 16;
    return row * S::kRowBytes + sixteen * S::kPadding + (S::kWarps == 4 ? piece ^ sixteen : piece) * 16;
  }
  QLORA_METHOD void copy(SharedAddress to, const uint8_t* from, bool row_exists) const {
    if (row_exists && inside_)
      ptx::cp_async_16(to, from);
    else  // any weight will do: its dy is zero, or its result is not stored
      ptx::store_shared(to, Words4{0, 0, 0, 0});
  }
  SharedAddress base_, to_, upper_to_, mine_;
  SharedAddress stage_;  // filled by the next fetch(); after a fetch(), the stage to read
  int rows_left_, chunks_left_;
  bool inside_;
  const uint8_t* from_;
  int64_t half_bytes_;
};

// The scales of a chunk's 64 rows for the in features of each warp, double-buffered and loaded while the previous chunk
// is multiplied. A thread computes the scale of one row for a pair of warps, or one scale for each of the two if a
// quantization block may end between them.
template <class S>
class ScaleTile {
 public:
  QLORA_METHOD ScaleTile(SharedAddress base, const WeightView& w, int64_t first_feature)
      : base_(base), row_(S::Group::index() * kChunk + S::Group::thread() % kChunk) {
    const int pair = S::Group::thread() / kChunk;
    for (int i = 0; i < 2; ++i) feature_[i] = static_cast<int>(min_i64(first_feature + (2 * pair + i) * 32, w.k - 32));
    to_ = 2 * pair * kChunk * 4 + slot(S::Group::thread() % kChunk) * 4;
  }

  // Starts loading the scales of the group's next chunk.
  QLORA_METHOD void load(const WeightView& w, const WarpScales& scales) {
    const int64_t row = min_i64(row_, w.n - 1) * w.k;
    raw_[0] = scales.load(w, (row + feature_[0]) >> w.block_shift);
    if (!is_shared(w)) raw_[1] = scales.load(w, (row + feature_[1]) >> w.block_shift);
    row_ += S::kGroups * kChunk;
  }
  // Computes the loaded scales and stores them in `buffer`, which must not be the one being read.
  QLORA_METHOD void store(const WeightView& w, const WarpScales& scales, int buffer) const {
    const SharedAddress to = base_ + buffer * S::kScaleStageBytes + to_;
    const float first = scales.value(raw_[0]), second = is_shared(w) ? first : scales.value(raw_[1]);
    ptx::store_shared(to, first);
    ptx::store_shared(to + kChunk * 4, second);
  }

  // Scales of rows 16t + 4 step … 16t + 4 step + 3.
  QLORA_METHOD Floats4 at(int buffer, int step) const {
    const int t = ptx::lane() % 4;
    const SharedAddress mine = base_ + buffer * S::kScaleStageBytes + (S::Group::warp() * kChunk + slot(16 * t)) * 4;
    return ptx::load_shared<Floats4>(mine ^ (16u * static_cast<uint32_t>(step)));
  }

 private:
  // In rows 32 … 63, adjacent groups of four are swapped, so that lanes t = 0 … 3 read different groups of banks.
  static QLORA_METHOD int slot(int row) { return row ^ (row >> 5 << 2); }

  // Whether both warps of a pair always use the same quantization block.
  static QLORA_METHOD bool is_shared(const WeightView& w) { return w.block_shift > 5 && w.k % 64 == 0; }

  SharedAddress base_, to_;
  int row_;  // row in the next chunk
  int feature_[2];
  RawScale raw_[2] = {};
};

// Unpacks four rows times four in features of a lane, scales and rounds them: `first` is the fragment of in features
// 4g + {0, 1}, `second` that of 4g + {2, 3}.
template <class T>
QLORA_DEVICE void unpack_rows(const ValuePairs& pairs, const uint32_t (&bytes)[4], const Floats4& scale,
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

template <class T, class S, TokenMode kMode>
QLORA_KERNEL void QLORA_BOUNDS(S::kBlockThreads, S::kGroups == 1 ? 2 : 1) kernel(QLORA_PARAMS GemmDxParams p) {
  if (!ptx::can_run<T>(S::kSharedBytes)) return;
  constexpr int kTokens = S::kTokens, kGroups = S::kGroups;
  using Group = typename S::Group;
  const SharedAddress table = ptx::shared_base();
  const int block_feature = ptx::block_y() * S::kFeatures;  // 32 bits are enough for features, but not for elements
  const int first_feature = block_feature + Group::warp() * 32;
  int first_token = ptx::block_x() * kTokens, expert = 0;
  if constexpr (kMode == TokenMode::kExperts) {
    const ExpertTile tile = expert_tile<kTokens>(p.out.plan, ptx::block_x());
    if (tile.expert == kOthersTile)
      store_zeros<T, kTokens, S::kBlockThreads>(p.out, block_feature, S::kFeatures, tile.first_position);
    if (tile.expert < 0) return;
    first_token = tile.first_position;
    expert = tile.expert;
  }
  const auto& weight = weight_of<kMode == TokenMode::kExperts>(p.weight, expert);
  const int chunks = static_cast<int>(ceil_div(weight.n, kChunk));

  const SharedAddress token_base = table + kPairTableBytes + Group::index() * S::kGroupBytes;
  const SharedAddress weight_base = token_base + S::Tile::kBytes;
  const WarpScales scales(weight);
  ScaleTile<S> scale_tile(weight_base + kStages * S::kWeightStageBytes, weight, block_feature);
  scale_tile.load(weight, scales);
  WeightTile<S> weights(weight_base, weight, block_feature);
  auto tokens = [&] {
    const SharedAddress base = token_base;
    if constexpr (kMode == TokenMode::kExperts)
      return typename S::Gathered(base, p.dy, p.out.plan.order + first_token, weight.n);
    else
      return typename S::Tile(base, p.dy, p.out.m, weight.n, weight.n, first_token);
  }();
  const auto fetch = [&] {
    weights.fetch();
    tokens.fetch();
  };
  start_pipeline<kStages>(fetch);
  ValuePairs::fill<S::kBlockThreads>(table, weight.quant_type);
  const ValuePairs pairs(table);
  scale_tile.store(weight, scales, 0);
  if constexpr (kGroups > 1) ptx::sync_threads();  // with one group, the barrier of the pipeline is enough

  float sum[2][kTokens / 8][4] = {};

  int buffer = 0;
  for (int chunk = Group::index(); chunk < chunks; chunk += kGroups, buffer ^= 1) {
    advance_pipeline<kStages, Group>(fetch);
    scale_tile.load(weight, scales);  // scales of the next chunk; beyond the end, those of the last row
    const SharedAddress bytes_at = weights.current();
    const auto place = place_in(tokens.current());
    unroll<2>([&](auto half) {  // two steps at a time: registers have room for their fragments only
      constexpr int h = decltype(half)::value;
      uint32_t fragment[2][2][4];
      unroll<2>([&](auto step) {
        constexpr int s = 2 * h + decltype(step)::value;
        const uint32_t bytes[4] = {ptx::load_shared<uint16_t, (4 * s + 0) * S::kRowBytes>(bytes_at),
                                   ptx::load_shared<uint16_t, (4 * s + 1) * S::kRowBytes>(bytes_at),
                                   ptx::load_shared<uint16_t, (4 * s + 2) * S::kRowBytes>(bytes_at),
                                   ptx::load_shared<uint16_t, (4 * s + 3) * S::kRowBytes>(bytes_at)};
        unpack_rows<T>(pairs, bytes, scale_tile.at(buffer, s), fragment[s % 2][0], fragment[s % 2][1]);
      });
      unroll<kTokens / 8>([&](auto group) {
        constexpr int j = decltype(group)::value;
        const auto dy = ptx::load_shared<Words4, j * 1024>(h == 0 ? place.low : place.high);
        const uint32_t words[4] = {dy.x, dy.y, dy.z, dy.w};
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int f = 0; f < 2; ++f) ptx::mma<T>(sum[f][j], fragment[s][f], words[2 * s], words[2 * s + 1], sum[f][j]);
      });
    });
    scale_tile.store(weight, scales, buffer ^ 1);
  }
  ptx::cp_async_wait<0>();
  if (!Group::add_up(table, sum)) return;
  if constexpr (kMode == TokenMode::kExperts) {  // read again, because the loop has no registers for it
    const ExpertTile tile = expert_tile<kTokens>(p.out.plan, ptx::block_x());
    first_token = tile.first_position;
    expert = tile.expert;
  }
  if constexpr (kMode == TokenMode::kAdapters)
    low_rank_steps_of_adapters<T, 2, kTokens>(p.out, first_feature, first_token, sum);
  else
    low_rank_steps<T, 2, kTokens, kMode>(p.out, first_feature, first_token, sum, expert);
  store_results<T, 2, kTokens, kMode>(p.out, first_feature, first_token, sum, expert);
}

template <class T, class S>
Status launch_shape(const GemmDxParams& p, cudaStream_t stream) {
  const bool experts = p.out.plan.order != nullptr;
  const Grid grid{experts ? expert_tiles<S::kTokens>(p.out.plan) : ceil_div(p.out.m, S::kTokens),
                  ceil_div(p.weight.k, S::kFeatures)};
  const auto kernel_of_call = experts                             ? kernel<T, S, TokenMode::kExperts>
                              : p.out.adapter_of_token != nullptr ? kernel<T, S, TokenMode::kAdapters>
                                                                  : kernel<T, S, TokenMode::kOne>;
  return start(kernel_of_call, grid, S::kBlockThreads, S::kSharedBytes, stream, p);
}

template <class T>
Status launch_typed(const GemmDxParams& p, cudaStream_t stream) {
  switch (p.tile) {
    case GemmTile::k128x64:
      return launch_shape<T, Shape<4, 64, 2>>(p, stream);
    case GemmTile::k64x64:
      return launch_shape<T, Shape<2, 64, 4>>(p, stream);
    case GemmTile::k64x32:
      return launch_shape<T, Shape<2, 32, 8>>(p, stream);
    case GemmTile::k128x64Wgmma:
    case GemmTile::k128x128Wgmma:
      return launch_gemm_dx_wgmma(p, stream);
    case GemmTile::k64x32Small:
      return launch_shape<T, Shape<2, 32, 4>>(p, stream);
    default:  // Turing has no bfloat16
      if constexpr (std::is_same_v<T, fp16>) return launch_shape<T, Shape<4, 64, 1>>(p, stream);
      return {"bfloat16 needs more shared memory than this GPU has"};
  }
}

}  // namespace gemm_dx

Status launch_gemm_dx(const GemmDxParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? gemm_dx::launch_typed<bf16>(p, stream) : gemm_dx::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
