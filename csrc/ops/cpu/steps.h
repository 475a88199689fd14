// The steps of several products on the CPU. Each step is one parallel loop over all products, balanced by cost.
#pragma once

#include <utility>
#include <vector>

#include "ops/cpu/balanced.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops_cpu {

// Memory for many buffers, allocated at once: ask for all, then allocate, then take them in the same order.
class Buffers {
 public:
  void ask(int64_t bytes) { total_ += aligned(bytes); }
  void allocate() { storage_ = empty_cpu({total_}, ScalarType::Byte); }
  template <class T>
  T* take(int64_t bytes) {
    uint8_t* data = storage_.mutable_data_ptr<uint8_t>() + std::exchange(used_, used_ + aligned(bytes));
    return reinterpret_cast<T*>(data);
  }

 private:
  static int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }
  Tensor storage_ = nothing();
  int64_t total_ = 0, used_ = 0;
};

// The cost of unpacking a weight, as a number of tokens that could be multiplied with it meanwhile.
constexpr int64_t kUnpackTokens = 8, kUnpackTokensOfTiles = 32;

// ---- steps on the gemv kernel ----

inline void run_dots(const cpu::KernelTable& kernels, const std::vector<cpu::DotParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::DotParams& p) { return p.rows; }, [](const cpu::DotParams& p) { return p.k * p.m; },
      kernels.dot);
}

inline void run_gemvs(const cpu::KernelTable& kernels, const std::vector<cpu::GemvParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::GemvParams& p) { return p.weight.n; },
      [](const cpu::GemvParams& p) { return p.weight.k * (p.m + 3) + p.r * p.m; },
      [&](const cpu::GemvParams& p, int64_t begin, int64_t end) {
        kernels.gemv(p, begin, end, thread_scratch(kernels.gemv_scratch(p)));
      });
}

// ---- steps on the gemm kernel ----

inline void run_packs(const cpu::KernelTable& kernels, const std::vector<cpu::PackParams>& jobs) {
  run_balanced(
      jobs, [&](const cpu::PackParams& p) { return ceil_div(p.cols, kernels.tile_cols); },
      [&](const cpu::PackParams& p) { return 2 * kernels.tile_cols * p.steps; }, kernels.pack);
}

inline void run_gemms(const cpu::KernelTable& kernels, const std::vector<cpu::GemmParams>& jobs) {
  const auto units = [&](const cpu::GemmParams& p) { return p.rows == 0 || p.cols == 0 ? 0 : kernels.gemm_items(p); };
  const auto cost = [&](const cpu::GemmParams& p) {
    int64_t steps = 0;
    for (int64_t i = 0; i < p.term_count; ++i) steps += p.terms[i].steps;
    return p.rows * steps * (p.cols + kUnpackTokens) / std::max(units(p), int64_t{1});
  };
  run_balanced(jobs, units, cost, [&](const cpu::GemmParams& p, int64_t begin, int64_t end) {
    kernels.gemm(p, begin, end, thread_scratch(kernels.gemm_scratch(p)));
  });
}

inline int64_t packed_bytes_of(const cpu::KernelTable& kernels, int64_t cols, int64_t steps) {
  return kernels.packed_floats(cols, steps) * 4;
}

// A product with the gemm kernel, whose result is a float32 matrix [count, rows].
inline cpu::GemmParams float_product(const cpu::Term& term, Operands form, int64_t rows, int64_t count, float scale,
                                     float* out) {
  cpu::GemmParams p;
  p.terms = &term;
  p.transposed = form == Operands::kTransposed;
  p.rows = rows;
  p.cols = count;
  p.scale = scale;
  p.out = out;
  p.out_ld = rows;
  return p;
}

// A product with the gemm kernel, whose result is a float32 matrix [rows, cols].
inline cpu::GemmParams row_product(const cpu::Term& term, Operands form, int64_t rows, int64_t cols, float scale) {
  cpu::GemmParams p = float_product(term, form, rows, cols, scale, nullptr);
  p.rows_are_major = true;
  p.out_ld = cols;
  return p;
}

// ---- steps on tiles ----

inline void run_factor_packs(const cpu::TileKernels& tiles, const std::vector<cpu::PackFactorParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::PackFactorParams& p) { return ceil_div(p.factor.features, cpu::kChunk); },
      [](const cpu::PackFactorParams& p) { return 8 * cpu::kChunk * p.factor.r; }, tiles.pack_factor);
}

inline void run_forward_tokens(const cpu::TileKernels& tiles, const std::vector<cpu::ForwardTokensParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::ForwardTokensParams& p) { return cpu::tiles_of(p.m); },
      [](const cpu::ForwardTokensParams& p) { return cpu::kTile * p.k * (2 + p.factor.r / 4); },
      [&](const cpu::ForwardTokensParams& p, int64_t begin, int64_t end) {
        tiles.forward_tokens(p, begin, end, thread_scratch(tiles.forward_tokens_scratch(p)));
      });
}

inline void run_forward_products(const cpu::TileKernels& tiles, const std::vector<cpu::ForwardTilesParams>& jobs) {
  const auto cost = [&](const cpu::ForwardTilesParams& p) {
    return p.weight.n * (p.weight.k + p.r) * (p.m + kUnpackTokensOfTiles) / tiles.forward_items(p);
  };
  run_balanced(jobs, tiles.forward_items, cost, [&](const cpu::ForwardTilesParams& p, int64_t begin, int64_t end) {
    tiles.forward(p, begin, end, thread_scratch(tiles.forward_scratch(p)));
  });
}

inline void run_backward_tokens(const cpu::TileKernels& tiles, const std::vector<cpu::BackwardTokensParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::BackwardTokensParams& p) { return cpu::tiles_of(p.m); },
      [](const cpu::BackwardTokensParams& p) { return cpu::kTile * p.n * (2 + p.factor.r / 4); },
      [&](const cpu::BackwardTokensParams& p, int64_t begin, int64_t end) {
        tiles.backward_tokens(p, begin, end, thread_scratch(tiles.backward_tokens_scratch(p)));
      });
}

inline void run_backward_products(const cpu::TileKernels& tiles, const std::vector<cpu::BackwardTilesParams>& jobs) {
  const auto cost = [&](const cpu::BackwardTilesParams& p) {
    return p.weight.k * (p.weight.n + p.r) * (p.m + kUnpackTokensOfTiles) / tiles.backward_items(p);
  };
  run_balanced(jobs, tiles.backward_items, cost, [&](const cpu::BackwardTilesParams& p, int64_t begin, int64_t end) {
    tiles.backward(p, begin, end, thread_scratch(tiles.backward_scratch(p)));
  });
}

inline void run_token_factor_packs(const cpu::TileKernels& tiles, const std::vector<cpu::PackTokenFactorParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::PackTokenFactorParams& p) { return ceil_div(p.m, cpu::kStep); },
      [](const cpu::PackTokenFactorParams& p) { return 8 * cpu::kStep * p.r; }, tiles.pack_token_factor);
}

inline void run_factor_grads(const cpu::TileKernels& tiles, const std::vector<cpu::FactorGradParams>& jobs) {
  run_balanced(
      jobs, [](const cpu::FactorGradParams& p) { return ceil_div(p.features, cpu::kGradFeatures); },
      [](const cpu::FactorGradParams& p) { return cpu::kGradFeatures * p.m * (8 + p.r); },
      [&](const cpu::FactorGradParams& p, int64_t begin, int64_t end) {
        tiles.factor_grad(p, begin, end, thread_scratch(tiles.factor_grad_scratch(p)));
      });
}

}  // namespace qlora::ops_cpu
