// The rows of a mixture's experts, and the steps of their products on the CPU: each step is one parallel loop over all
// experts of a slice, so that threads are busy however unevenly rows are distributed.
#pragma once

#include <utility>
#include <vector>

#include "cpu/select.h"
#include "ops/cpu/balanced.h"
#include "ops/cpu/gemm.h"
#include "ops/cpu/gemv.h"
#include "ops/cpu/tiles.h"

namespace qlora::ops_cpu {

// The rows of one expert: positions [begin, begin + count) of ExpertRows.
struct ExpertGroup {
  int64_t expert, begin, count;
};

// Rows in the order of their experts, without a sorted copy: kernels gather and scatter by these numbers.
class ExpertRows {
 public:
  explicit ExpertRows(const Experts& e) {
    const int64_t* of_row = e.of_row.const_data_ptr<int64_t>();
    std::vector<int64_t> next(static_cast<size_t>(e.count));
    for (int64_t i = 0; i < e.rows(); ++i) {
      if (of_row[i] < 0 || of_row[i] >= e.count)
        without_expert_.push_back(i);
      else
        ++next[static_cast<size_t>(of_row[i])];
    }
    int64_t begin = 0;
    for (int64_t expert = 0; expert < e.count; ++expert) {
      const int64_t count = std::exchange(next[static_cast<size_t>(expert)], begin);
      if (count > 0) groups_.push_back({expert, begin, count});
      begin += count;
    }
    rows_.resize(static_cast<size_t>(begin));
    for (int64_t i = 0; i < e.rows(); ++i)
      if (of_row[i] >= 0 && of_row[i] < e.count) rows_[static_cast<size_t>(next[static_cast<size_t>(of_row[i])]++)] = i;
    if (e.choices > 1) {
      tokens_ = rows_;
      for (int64_t& token : tokens_) token /= e.choices;
    }
  }

  const std::vector<int64_t>& without_expert() const { return without_expert_; }
  const int64_t* rows(const ExpertGroup& g) const { return rows_.data() + g.begin; }
  const int64_t* tokens(const ExpertGroup& g) const { return (tokens_.empty() ? rows_ : tokens_).data() + g.begin; }

  // Consecutive experts with at most kExpertRows rows, or one with more. A slice bounds the memory for packed tokens,
  // and keeps them in the last-level cache.
  std::vector<std::vector<ExpertGroup>> slices() const {
    std::vector<std::vector<ExpertGroup>> slices;
    int64_t rows = cpu::kExpertRows;
    for (const ExpertGroup& g : groups_) {
      if (rows + g.count > cpu::kExpertRows) {
        slices.emplace_back();
        rows = 0;
      }
      slices.back().push_back(g);
      rows += g.count;
    }
    return slices;
  }

 private:
  std::vector<ExpertGroup> groups_;
  std::vector<int64_t> rows_, tokens_, without_expert_;
};

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

// Matrix `i` of a stack whose matrices have `rows` rows.
inline Matrix matrix_of_stack(const Matrix& stack, int64_t i, int64_t rows) {
  const int64_t bytes = stack.dtype == DType::kFloat32 ? 4 : 2;
  return {stack.tensor, static_cast<const char*>(stack.data) + i * rows * stack.cols * bytes, stack.dtype, rows,
          stack.cols};
}

// The cost of unpacking a weight, as a number of tokens that could be multiplied with it meanwhile.
constexpr int64_t kUnpackTokens = 8, kUnpackTokensOfTiles = 32;

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

// ---- calls ----

using ExpertGroups = std::vector<ExpertGroup>;

// The checked arguments of a call.
struct ExpertCall {
  const cpu::KernelTable& kernels;
  const Experts& e;
  const ExpertRows& rows;
  WeightView stack;

  WeightView weight(const ExpertGroup& g) const { return weight_of_stack(stack, g.expert); }
  Matrix a(const ExpertGroup& g) const { return matrix_of_stack(e.adapter->a, g.expert, e.r); }
  Matrix b(const ExpertGroup& g) const { return matrix_of_stack(e.adapter->b, g.expert, stack.n); }
  const void* bias(const ExpertGroup& g) const { return e.bias ? matrix_of_stack(*e.bias, g.expert, 1).data : nullptr; }
  DType bias_dtype() const { return e.bias ? e.bias->dtype : DType::kFloat32; }
};

// Gathered rows of a matrix as packed columns of a gemm.
inline cpu::PackParams pack_rows_of(const Matrix& m, StepsAre steps_are, const int64_t* row_of, int64_t count,
                                    float* out) {
  const bool rows = steps_are == StepsAre::kRows;
  return {m.data, m.dtype, m.cols, rows, rows ? m.cols : count, rows ? count : m.cols, out, row_of};
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

// What the steps of a product on the gemm kernel have in common: operands and terms that outlive the loops.
struct GemmJob {
  WeightView weight;
  cpu::Term down, terms[2];  // of the down projection, and of the product
};

// Zeros for the rows that no expert of this process computes.
inline void clear_rows(const std::vector<int64_t>& rows, int64_t cols, const Tensor& out) {
  const int64_t bytes = cols * out.element_size();
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  for (const int64_t row : rows) std::fill_n(data + row * bytes, bytes, char{0});
}

// lora_b [experts, n, r] as kernels read it. PEFT's is a view of [n, r * experts], which is copied here for the experts
// in use; the rest of the copy stays uninitialised. torch would permute all of it (docs/notes/cpu-kernels.md).
inline OptionalTensor with_ranks_side_by_side(const OptionalTensor& lora_b, const Tensor& expert_of_row) {
  const bool is_known = lora_b.has_value() && lora_b->dim() == 3 && expert_of_row.scalar_type() == ScalarType::Long;
  if (!is_known || lora_b->is_contiguous() || !lora_b->is_cpu() || !expert_of_row.is_cpu()) return lora_b;
  const int64_t experts = lora_b->size(0), n = lora_b->size(1), r = lora_b->size(2);
  std::vector<bool> used(static_cast<size_t>(experts));
  const Tensor of_row = as_contiguous(expert_of_row);
  for (int64_t i = 0; i < of_row.numel(); ++i) {
    const int64_t expert = of_row.const_data_ptr<int64_t>()[i];
    if (expert >= 0 && expert < experts) used[static_cast<size_t>(expert)] = true;
  }
  const Tensor out = empty_of_shape(*lora_b);
  const auto copy = [&](auto* to, const auto* from) {
    const int64_t expert_stride = lora_b->stride(0), row_stride = lora_b->stride(1), rank_stride = lora_b->stride(2);
    parallel(n, rows_per_task(r * experts), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t expert = 0; expert < experts; ++expert) {
          if (!used[static_cast<size_t>(expert)]) continue;
          const auto* source = from + expert * expert_stride + row * row_stride;
          auto* target = to + (expert * n + row) * r;
          for (int64_t rank = 0; rank < r; ++rank) target[rank] = source[rank * rank_stride];
        }
    });
  };
  if (out.element_size() == 4)
    copy(static_cast<uint32_t*>(out.mutable_data_ptr()), static_cast<const uint32_t*>(lora_b->const_data_ptr()));
  else if (out.element_size() == 2)
    copy(static_cast<uint16_t*>(out.mutable_data_ptr()), static_cast<const uint16_t*>(lora_b->const_data_ptr()));
  else
    return lora_b;  // the check of the dtype will refuse it
  return out;
}

}  // namespace qlora::ops_cpu
