// Kernel for few tokens (m <= 16): y = x Wᵀ + low-rank term + bias on the tensor cores. It reads the weight once and
// unpacks it in registers. A thread block takes 16 or 32 rows (select.h). Its warps take turns in chunks of 64 along k,
// and their sums are added in a fixed order.
#include "cuda/device/experts.cuh"
#include "cuda/device/fragments.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/unroll.cuh"

namespace qlora::cuda {
namespace gemv {

constexpr int kWarps =
    kGemvWarps;  // with more warps, each has too few chunks for its start-up (docs/notes/cuda-kernels.md)
constexpr int kThreads = 32 * kWarps;

// Words between the sums of two tokens and of two warps, padded so that neither the stores of lanes (g, t) nor the
// loads of half warps have bank conflicts.
template <int R>
constexpr int kTokenPitch = 16 * R + 8;
template <int R, int kTokens>
constexpr int kWarpPitch = kTokens * kTokenPitch<R> + 32 / kWarps;

// The position of a token among the sums of a warp. The two tokens of a lane are four positions apart, and those of
// adjacent lanes are adjacent.
template <int kTokens>
QLORA_DEVICE int place_of_token(int token) {
  return token / 2 % 4 + token % 2 * 4 + token / 8 * 8;
}

QLORA_DEVICE uint32_t word_of(const Words4& lower, const Words4& upper, int i) {
  const uint32_t words[8] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
  return words[i];
}

// Half of the low-rank term of one row and token: every second group of eight ranks, or every second rank.
template <class T>
QLORA_DEVICE float low_rank_part(const GemvParams& p, int64_t row, int64_t token, int64_t adapter, int half) {
  const float* t = p.x_down + token * p.r;
  const int64_t b = adapter * p.b_adapter_stride + row * p.r;
  float sum = 0.0f;
  if (p.b_is_vectorized) {
    const T* up = static_cast<const T*>(p.lora_b) + b;
    for (int64_t r = half * 8; r < p.r; r += 16) {
      const Words4 words = ptx::load(reinterpret_cast<const Words4*>(up + r));
      const Floats4 low = ptx::load(reinterpret_cast<const Floats4*>(t + r));
      const Floats4 high = ptx::load(reinterpret_cast<const Floats4*>(t + r + 4));
      sum = fmaf(ptx::unpack<T>(words.x, 0), low.x, sum);
      sum = fmaf(ptx::unpack<T>(words.x, 1), low.y, sum);
      sum = fmaf(ptx::unpack<T>(words.y, 0), low.z, sum);
      sum = fmaf(ptx::unpack<T>(words.y, 1), low.w, sum);
      sum = fmaf(ptx::unpack<T>(words.z, 0), high.x, sum);
      sum = fmaf(ptx::unpack<T>(words.z, 1), high.y, sum);
      sum = fmaf(ptx::unpack<T>(words.w, 0), high.z, sum);
      sum = fmaf(ptx::unpack<T>(words.w, 1), high.w, sum);
    }
  } else {
    for (int64_t r = half; r < p.r; r += 2)
      sum = fmaf(load_element(p.lora_b, p.lora_dtype, b + r), ptx::load(t + r), sum);
  }
  return sum;
}

// The tokens of a block: those of the launch, or the rows of one expert at adjacent positions of the plan.
template <bool kExperts>
class BlockTokens {
 public:
  QLORA_METHOD explicit BlockTokens(const GemvParams& p) {
    if constexpr (kExperts) {
      const ExpertTile tile = expert_tile<kGemvExpertsPiece>(p.plan, ptx::block_y());
      expert_ = tile.expert;
      order_ = p.plan.order + tile.first_position;
      x_row_ = p.plan.x_row + tile.first_position;
      const bool exists =
          ptx::lane() < kGemvExpertsPiece && expert_ != kUnusedTile && ptx::load(order_ + ptx::lane()) >= 0;
      count_ = ptx::popcount(ptx::ballot(exists));  // tokens come first
    }
  }
  QLORA_METHOD int64_t count(const GemvParams& p) const { return kExperts ? count_ : p.m; }
  QLORA_METHOD int expert() const { return expert_; }
  // The rows of y and x of a token of the block.
  QLORA_METHOD int64_t row(int token) const { return kExperts ? ptx::load(order_ + token) : token; }
  QLORA_METHOD int64_t x_row(int token) const { return kExperts ? ptx::load(x_row_ + token) : token; }

 private:
  int expert_ = 0, count_ = 0;
  const int *order_ = nullptr, *x_row_ = nullptr;
};

// Adds the sums of the warps and stores y. A warp handles 16 rows of one token: lanes 0-15 add the sums of the first
// half of the warps, lanes 16-31 those of the second half.
template <class T, int R, int kTokens, bool kExperts>
QLORA_DEVICE void finish(const GemvParams& p, const BlockTokens<kExperts>& tokens, SharedAddress sums,
                         int64_t first_row) {
  const int half = ptx::lane() / 16;
  for (int item = ptx::warp(); item < kTokens * R; item += kWarps) {
    const int token = item / R, local = item % R * 16 + ptx::lane() % 16;
    if (token >= tokens.count(p)) return;
    const int64_t of_y = tokens.row(token);
    const int64_t row = first_row + local;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps / 2; ++w)
      sum += ptx::load_shared<float>(sums + ((half * kWarps / 2 + w) * kWarpPitch<R, kTokens> +
                                             place_of_token<kTokens>(token) * kTokenPitch<R> + local) *
                                                4);
    if (p.r > 0 && row < p.weight.n) {
      const int64_t adapter = kExperts                        ? tokens.expert()
                              : p.adapter_of_token != nullptr ? ptx::load(p.adapter_of_token + token)
                                                              : 0;
      if (adapter < -1 || adapter >= p.adapters)
        sum = __builtin_nanf("");  // invalid adapter
      else if (adapter >= 0)
        sum += low_rank_part<T>(p, row, of_y, adapter, half);
    }
    sum += ptx::shuffle_xor(sum, 16);
    if (half == 0 && row < p.weight.n) {
      if (p.bias != nullptr)
        sum += load_element(p.bias, p.bias_dtype, (kExperts ? tokens.expert() * p.weight.n : 0) + row);
      ptx::store(&(static_cast<T*>(p.y) + of_y * p.weight.n + row)->bits,
                 static_cast<uint16_t>(ptx::pack<T>(sum, 0.0f)));
    }
  }
}

// Copies the chunks of one warp from global memory into a ring of stages. A stage holds the packed bytes of 16R rows
// (32 bytes each; row i of lane group g is in slot 8i + g) and m tokens (128 bytes each).
template <int R, int kTokens, int kStages, bool kExperts>
class Ring {
 public:
  static QLORA_BOTH constexpr int stage_bytes(int64_t m) { return 512 * R + 128 * static_cast<int>(m); }
  static QLORA_BOTH constexpr int bytes(int64_t m) { return stage_bytes(m) * kStages; }

  QLORA_METHOD Ring(SharedAddress base, const GemvParams& p, const WeightView& weight,
                    const BlockTokens<kExperts>& tokens, int64_t first_row)
      : base_(base), end_(base + bytes(p.m)), stage_bytes_(stage_bytes(p.m)), x_pitch_bytes_(p.weight.k * 8) {
    const int slot = ptx::lane() / 2, token = ptx::lane() / 8, piece = ptx::lane() % 8;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int64_t row = min_i64(first_row + slot % 8 * 2 * R + slot / 8 + 2 * i, p.weight.n - 1);
      w_[i] = weight.packed + (row * p.weight.k + ptx::warp() * kChunk) / 2 + ptx::lane() % 2 * 16;
    }
    x_ = static_cast<const char*>(p.x) + (token * p.weight.k + ptx::warp() * kChunk) * 2 + piece * 16;
    w_to_ = ptx::lane() * 16;
    x_to_ = 512 * R + token * 128 + (piece ^ (token & 1)) * 16;
    tokens_ = static_cast<int>(tokens.count(p)) - token;
    if constexpr (kExperts) {
      x_ -= token * p.weight.k * 2;
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i)
        x_offset_[i] = 4 * i < tokens_ ? tokens.x_row(token + 4 * i) * p.weight.k * 2 : 0;
    }
  }

  // Restarts the ring for the next `chunks` chunks and starts copying the first ones.
  QLORA_METHOD void begin(int chunks) {
    stage_ = base_;
    left_ = chunks;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch();
  }

  // Waits for the next chunk, starts copying one more, and returns the address. Whole warps must call it.
  QLORA_METHOD SharedAddress next() {
    ptx::cp_async_wait<kStages - 2>();
    ptx::sync_warp();
    fetch();
    return stage_;
  }

 private:
  // Every call commits one cp.async group, even if nothing is left to copy.
  QLORA_METHOD void fetch() {
    if (left_ > 0) {
#pragma unroll
      for (int i = 0; i < R; ++i) {
        ptx::cp_async_16(stage_ + 512 * i + w_to_, w_[i]);
        w_[i] += kWarps * kChunk / 2;
      }
      const char* x = x_;
#pragma unroll
      for (int i = 0; i < kTokens / 4; ++i, x += x_pitch_bytes_)
        // The variant for 16 tokens has more than eight, so the first eight need no check.
        if ((kTokens == 16 && i < 2) || 4 * i < tokens_)
          ptx::cp_async_16(stage_ + x_to_ + i * 512, kExperts ? x_ + x_offset_[i] : x);
      x_ += kWarps * kChunk * 2;
    }
    --left_;
    stage_ = stage_ + stage_bytes_ == end_ ? base_ : stage_ + stage_bytes_;
    ptx::cp_async_commit();
  }

  SharedAddress base_, end_;
  int stage_bytes_;
  int64_t x_pitch_bytes_;  // bytes of four tokens
  const uint8_t* w_[R];
  const char* x_;
  int64_t x_offset_[kExperts ? kTokens / 4 : 1];  // of each token from x_
  SharedAddress w_to_, x_to_;
  SharedAddress stage_ = 0;  // filled by the next fetch(); after a fetch(), the stage to read
  int tokens_, left_ = 0;
};

// The products of 16R rows from first_row on with the tokens of the block.
template <class T, int R, int kTokens, int kStages, bool kExperts>
QLORA_DEVICE void multiply_rows(const GemvParams& p, const WeightView& weight, const BlockTokens<kExperts>& tokens,
                                int64_t first_row, bool has_table) {
  const SharedAddress table = ptx::shared_base();
  const int chunks = static_cast<int>(p.weight.k / kChunk);
  const int g = ptx::lane() / 4, t = ptx::lane() % 4;
  using Chunks = Ring<R, kTokens, kStages, kExperts>;
  Chunks ring(table + kPairTableBytes + ptx::warp() * Chunks::bytes(p.m), p, weight, tokens, first_row);
  const int panel_chunks = p.tile.panel_chunks;
  using Panel = ScalePanel<kWarps, 16 * R, 4>;
  const Panel panel(table + kPairTableBytes + kWarps * Chunks::bytes(p.m), panel_chunks);
  SharedAddress my_x[kTokens / 8];
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int token = static_cast<int>(min_i64(8 * j + g, tokens.count(p) - 1));
    my_x[j] = 512 * R + token * 128 + (2 * t + (token & 1)) * 16;
  }
  const WarpScales scales(weight);
  const LevelPairs<T> pairs(table);

  float sum[R][kTokens / 8][4] = {};
  for (int panel_chunk = 0; panel_chunk < chunks; panel_chunk += panel_chunks) {
    const int count = chunks - panel_chunk < panel_chunks ? chunks - panel_chunk : panel_chunks;
    if (panel_chunk > 0) ptx::sync_threads();  // all warps have finished with the previous panel
    const int my_count = (count - ptx::warp() + kWarps - 1) / kWarps;
    ring.begin(my_count);  // the copies run while the table and the scales are written
    if (panel_chunk == 0 && !has_table)
      LevelPairs<T>::template fill<kThreads>(table, p.weight.quant_type, p.level_multiplier);
    panel.fill(weight, scales, first_row, panel_chunk, count, p.level_factor);
    ptx::sync_threads();

    SharedAddress scale_at = panel.address(2 * R * g, ptx::warp());
    for (int i = 0; i < my_count; ++i) {
      const SharedAddress here = ring.next();
      Words4 x[kTokens / 8][2];
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        // The second 16 bytes follow the first, or precede them if swizzled.
        x[j][0] = ptx::load_shared<Words4>(here + my_x[j]);
        x[j][1] = ptx::load_shared<Words4>((here + my_x[j]) ^ 16u);
      }
#pragma unroll
      for (int f = 0; f < R; ++f) {
        const auto a = ptx::load_shared<Words2>(here + 512 * f + g * 32 + t * 8);
        const auto b = ptx::load_shared<Words2>(here + 512 * f + 256 + g * 32 + t * 8);
        float part[kTokens / 8][4];
        const float kNone[4] = {};
        unroll<4>([&](auto step) {
          constexpr int kStep = decltype(step)::value;
          uint32_t fragment[4];
          unpack_step<T, kStep>(pairs, a, b, fragment);
#pragma unroll
          for (int j = 0; j < kTokens / 8; ++j) {
            const uint32_t b0 = word_of(x[j][0], x[j][1], 2 * kStep), b1 = word_of(x[j][0], x[j][1], 2 * kStep + 1);
            if constexpr (kStep == 0)
              ptx::mma<T>(part[j], fragment, b0, b1, kNone);
            else
              ptx::mma<T>(part[j], fragment, b0, b1, part[j]);
          }
        });
        const float scale_a = ptx::load_shared<float>(scale_at + 2 * f * panel.pitch() * 4);
        const float scale_b = ptx::load_shared<float>(scale_at + (2 * f + 1) * panel.pitch() * 4);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          sum[f][j][0] = fmaf(scale_a, part[j][0], sum[f][j][0]);
          sum[f][j][1] = fmaf(scale_a, part[j][1], sum[f][j][1]);
          sum[f][j][2] = fmaf(scale_b, part[j][2], sum[f][j][2]);
          sum[f][j][3] = fmaf(scale_b, part[j][3], sum[f][j][3]);
        }
      }
      scale_at += kWarps * 4;
    }
    ptx::cp_async_wait<0>();
  }

  ptx::sync_threads();  // the table or, if it is needed again, the rings are overwritten by the sums
  const SharedAddress sums = table + (kExperts ? kPairTableBytes : 0);
  const SharedAddress mine = sums + (ptx::warp() * kWarpPitch<R, kTokens> + 2 * R * g) * 4;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const SharedAddress to = mine + place_of_token<kTokens>(8 * j + 2 * t + i) * kTokenPitch<R> * 4;
      if constexpr (R == 1)
        ptx::store_shared(to, Floats2{sum[0][j][i], sum[0][j][2 + i]});
      else
        ptx::store_shared(to, Floats4{sum[0][j][i], sum[0][j][2 + i], sum[1][j][i], sum[1][j][2 + i]});
    }
  ptx::sync_threads();
  finish<T, R, kTokens>(p, tokens, sums, first_row);
}

template <class T, int R, int kTokens, int kStages, bool kExperts>
QLORA_KERNEL void QLORA_BOUNDS(kThreads, 2) kernel(QLORA_PARAMS GemvParams p) {
  if (!ptx::can_run<T>(0)) return;
  const BlockTokens<kExperts> tokens(p);
  int64_t first_row = static_cast<int64_t>(ptx::block_x()) * 16 * R;
  if constexpr (kExperts) {
    if (tokens.expert() == kUnusedTile) return;
    const WeightView weight = weight_of_stack(p.weight, tokens.expert());
    for (bool has_table = false; first_row < p.weight.n; first_row += p.row_blocks * 16 * R, has_table = true) {
      if (tokens.expert() == kOthersTile) {
        for (int i = ptx::thread(); i < tokens.count(p) * 16 * R; i += kThreads)
          if (first_row + i % (16 * R) < p.weight.n)
            ptx::store(&(static_cast<T*>(p.y) + tokens.row(i / (16 * R)) * p.weight.n + first_row + i % (16 * R))->bits,
                       uint16_t{0});
        continue;
      }
      if (has_table) ptx::sync_threads();  // the sums of the rows before have been read
      multiply_rows<T, R, kTokens, kStages, kExperts>(p, weight, tokens, first_row, has_table);
    }
  } else {
    multiply_rows<T, R, kTokens, kStages, kExperts>(p, p.weight, tokens, first_row, false);
  }
}

template <class T, int R, int kTokens, bool kExperts = false>
Status launch_tile(const GemvParams& p, cudaStream_t stream) {
  constexpr int kStages = gemv_stages(kTokens);
  static_assert(kWarps * kWarpPitch<R, kTokens> * 4 <= kPairTableBytes, "the sums fit where the table was");
  static_assert(
      gemv_shared_bytes(16 * R, kTokens, 7) ==
          kPairTableBytes + kWarps * Ring<R, kTokens, kStages, kExperts>::bytes(kTokens) + panel_bytes(16 * R, 7),
      "select.h counts the same bytes");
  const auto shared_bytes = static_cast<int>(gemv_shared_bytes(16 * R, p.m, p.tile.panel_chunks));
  const Grid grid = kExperts ? Grid{p.row_blocks, p.plan.piece_count} : Grid{ceil_div(p.weight.n, 16 * R)};
  return start(kernel<T, R, kTokens, kStages, kExperts>, grid, kThreads, shared_bytes, stream, p);
}

template <class T>
Status launch_typed(const GemvParams& p, cudaStream_t stream) {
  if (p.plan.order != nullptr) return launch_tile<T, 1, kGemvExpertsPiece, true>(p, stream);
  if (p.tile.rows == 32)
    return p.m <= 8 ? Status{"32 rows are for more than 8 tokens"} : launch_tile<T, 2, 16>(p, stream);
  return p.m <= 8 ? launch_tile<T, 1, 8>(p, stream) : launch_tile<T, 1, 16>(p, stream);
}

}  // namespace gemv

Status launch_gemv(GemvParams p, cudaStream_t stream) {
  p.level_multiplier = level_multiplier(p.weight.quant_type, p.dtype);
  p.level_factor = 1.0f / p.level_multiplier;
  return p.dtype == DType::kBFloat16 ? gemv::launch_typed<bf16>(p, stream) : gemv::launch_typed<fp16>(p, stream);
}

}  // namespace qlora::cuda
