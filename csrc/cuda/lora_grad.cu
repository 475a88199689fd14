// Gradients of the low-rank factors on the tensor cores: d_lora_a = dy_downᵀ x and d_lora_b = dyᵀ x_down, sums over
// tokens, in one launch.
//
// A block owns features of x (or dy) and iterates over tokens, 64 x 64 elements at a time. Both operands are stored by
// token, and ldmatrix transposes them. The float32 activations are loaded into registers one chunk ahead and split into
// 16-bit parts once for the whole block.
#include "cuda/device/half_range.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/low_rank.cuh"
#include "cuda/device/token_tile.cuh"

namespace qlora::cuda {
namespace lora_grad {

constexpr int kThreads = 128;
constexpr int kStages = 3;
constexpr int kChunk = 64;
constexpr int kStageBytes = kChunk * 128;

template <int kRanks>
constexpr int kColumns = lora_grad_features(kRanks) / kChunk;  // chunks of features of a block

// The activations of a chunk of tokens, [64][kRanks] 16-bit numbers in pieces of eight. The order of pieces varies from
// token to token, so that ldmatrix reads the pieces of eight tokens from different banks.
template <class T, int kRanks>
class ActivationTile {
 public:
  static constexpr int kBytes = kChunk * kRanks * 2;

  QLORA_METHOD ActivationTile(SharedAddress base, const LoraGradJob& job, const LoraGradParams& p, int64_t first_rank)
      : base_(base),
        activations_(job.activations),
        m_(p.m),
        ranks_(p.ranks),
        first_rank_(first_rank),
        order_(p.plan.order),
        parts_(p.splits ? 2 : 1) {
    if (job.largest != nullptr) factor_ = to_half_range(float_of(static_cast<uint32_t>(ptx::load(job.largest))));
  }

  // Starts loading the thread's share of the chunk at first_position. All threads must call it, and store().
  QLORA_METHOD void load(int64_t first_position) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const int64_t position = first_position + token_of(i);
      const int64_t token = order_ != nullptr ? ptx::load(order_ + position) : position < m_ ? position : -1;
      raw_[i] =
          token < 0 ? Floats4{0, 0, 0, 0} : load_activations(activations_, token, first_rank_ + 4 * quad_of(i), ranks_);
    }
  }
  QLORA_METHOD void store(int buffer) const {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      Words2 high, low;
      split_pair<T>(raw_[i].x * factor_, raw_[i].y * factor_, high.x, low.x);
      split_pair<T>(raw_[i].z * factor_, raw_[i].w * factor_, high.y, low.y);
      const SharedAddress to = at(buffer, 0, token_of(i), quad_of(i) / 2) + quad_of(i) % 2 * 8;
      ptx::store_shared(to, high);
      if (parts_ == 2) ptx::store_shared(to + kBytes, low);
    }
  }

  // The fragment of 16 ranks and 16 tokens.
  QLORA_METHOD void fragment(int buffer, int part, int sixteen_tokens, int sixteen_ranks, uint32_t (&a)[4]) const {
    const int matrix = ptx::lane() / 8;
    ptx::load_matrices_transposed(
        a, at(buffer, part, 16 * sixteen_tokens + matrix / 2 * 8 + ptx::lane() % 8, 2 * sixteen_ranks + matrix % 2));
  }

  QLORA_METHOD int parts() const { return parts_; }
  QLORA_METHOD float factor() const { return factor_; }

 private:
  static constexpr int kPieces = kRanks / 8, kQuads = kChunk * kRanks / 4 / kThreads;
  static QLORA_METHOD int token_of(int i) { return (ptx::thread() + i * kThreads) / (kRanks / 4); }
  static QLORA_METHOD int quad_of(int i) { return (ptx::thread() + i * kThreads) % (kRanks / 4); }
  QLORA_METHOD SharedAddress at(int buffer, int part, int token, int piece) const {
    const int exchanged = piece ^ (token / (8 / kPieces) % kPieces);
    return base_ + (buffer * parts_ + part) * kBytes + (token * kPieces + exchanged) * 16;
  }

  SharedAddress base_;
  const float* activations_;
  int64_t m_, ranks_, first_rank_;
  const int* order_;
  int parts_;
  float factor_ = 1.0f;
  Floats4 raw_[kQuads];
};

template <class T, int kRanks>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS LoraGradParams p) {
  if (!ptx::can_run<T>(0)) return;
  constexpr int kGroups = kRanks / 16;
  const int64_t rank_blocks = ceil_div(p.ranks, kRanks);
  const int64_t first_rank = ptx::block_z() % rank_blocks * kRanks, adapter = ptx::block_z() / rank_blocks;
  const LoraGradJob& job = p.job[ptx::block_y() % p.count];
  const int64_t part = ptx::block_y() / p.count;
  const int64_t first_feature = int64_t{ptx::block_x()} * kColumns<kRanks> * kChunk;
  if (first_feature >= job.features || part >= job.parts) return;  // the grid is sized for the larger job
  const int* order = p.plan.order;
  const int64_t first_chunk = order != nullptr ? ptx::load(p.plan.first_tile + adapter) : 0;
  const int64_t chunks =
      order != nullptr ? ptx::load(p.plan.first_tile + adapter + 1) - first_chunk : ceil_div(p.m, kChunk);
  const int64_t begin = (first_chunk + chunks * part / job.parts) * kChunk;
  const int64_t end = (first_chunk + chunks * (part + 1) / job.parts) * kChunk;
  const T* x = static_cast<const T*>(job.x);
  const SharedAddress stages = ptx::shared_base(), stages_end = stages + kStages * kStageBytes;
  ActivationTile<T, kRanks> activations(stages_end, job, p, first_rank);

  SharedAddress stage = stages;  // filled by the next fetch(); after a fetch(), the stage to read
  int64_t next_token = begin;
  int next_column = 0;
  TokenRows<kChunk, kThreads> rows;
  const auto fetch = [&] {
    if (next_token < end) {
      if (next_column == 0) rows.set(job.row, p.m, next_token);
      rows.fetch(stage, x, job.features, first_feature + next_column * kChunk);
    }
    stage = stage + kStageBytes == stages_end ? stages : stage + kStageBytes;
    if (++next_column == kColumns<kRanks>) {
      next_column = 0;
      next_token += kChunk;
    }
  };
  start_pipeline<kStages>(fetch);
  if (begin < end) activations.load(begin);

  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  // The address that ldmatrix needs from a lane: row lane % 16 of 16 tokens, first or second piece of the warp.
  const int matrix_row = ptx::lane() % 16, matrix_piece = ptx::lane() / 16;
  float grad[kColumns<kRanks>][kGroups][2][4] = {};  // ranks 16 group + …, 16 features of this warp
  int buffer = 0;
  for (int64_t token = begin; token < end; token += kChunk, buffer ^= 1) {
    activations.store(buffer);  // visible to all threads after the barrier of the first column
    if (token + kChunk < end) activations.load(token + kChunk);
    unroll<kColumns<kRanks>>([&](auto column) {
      constexpr int c = decltype(column)::value;
      advance_pipeline<kStages>(fetch);
      const SharedAddress features = stage + swizzled(matrix_row, 2 * ptx::warp() + matrix_piece);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t b[4];
        ptx::load_matrices_transposed(b, features + step * 2048);
#pragma unroll 1
        for (int part = 0; part < activations.parts(); ++part) {
#pragma unroll
          for (int i = 0; i < kGroups; ++i) {
            uint32_t a[4];
            activations.fragment(buffer, part, step, i, a);
            ptx::mma<T>(grad[c][i][0], a, b[0], b[1], grad[c][i][0]);
            ptx::mma<T>(grad[c][i][1], a, b[2], b[3], grad[c][i][1]);
          }
        }
      }
    });
  }
  ptx::cp_async_wait<0>();

  float* out = job.out + (part * p.plan.adapters + adapter) * p.ranks * job.features;
  const float factor = activations.factor();  // a power of two
#pragma unroll
  for (int c = 0; c < kColumns<kRanks>; ++c)
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t feature = first_feature + c * kChunk + ptx::warp() * 16 + j * 8 + 2 * t;
          const int64_t rank = first_rank + 16 * i + g + half * 8;
          if (feature >= job.features || rank >= p.ranks) continue;
          float* to = out + rank * job.rank_stride + feature * job.feature_stride;
          const Floats2 values{grad[c][i][j][2 * half] / factor, grad[c][i][j][2 * half + 1] / factor};
          if (job.feature_stride == 1) {
            ptx::store(reinterpret_cast<Floats2*>(to), values);
          } else {
            ptx::store(to, values.x);
            ptx::store(to + job.feature_stride, values.y);
          }
        }
}

template <class T, int kRanks>
Status launch_ranks(const LoraGradParams& p, cudaStream_t stream) {
  static_assert(kChunk == kAdapterTile, "a chunk of tokens is one tile of a plan");
  int64_t features = 0;
  int parts = 0;
  for (int i = 0; i < p.count; ++i) {
    features = p.job[i].features > features ? p.job[i].features : features;
    parts = p.job[i].parts > parts ? p.job[i].parts : parts;
  }
  const Grid grid{ceil_div(features, lora_grad_features(kRanks)), parts * p.count,
                  ceil_div(p.ranks, kRanks) * p.plan.adapters};
  return start(kernel<T, kRanks>, grid, kThreads, lora_grad_shared_bytes(kRanks, p.splits), stream, p);
}

template <class T>
Status launch_typed(const LoraGradParams& p, cudaStream_t stream) {
  return p.ranks_per_block == 16   ? launch_ranks<T, 16>(p, stream)
         : p.ranks_per_block == 32 ? launch_ranks<T, 32>(p, stream)
                                   : launch_ranks<T, 64>(p, stream);
}

}  // namespace lora_grad

Status launch_lora_grad(const LoraGradParams& p, cudaStream_t stream) {
  return p.dtype == DType::kBFloat16 ? lora_grad::launch_typed<bf16>(p, stream)
                                     : lora_grad::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
