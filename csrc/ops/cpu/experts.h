// The rows of a mixture's experts, and what a call for them has. Each step of their products is one parallel loop over
// all experts of a slice, so that threads are busy however unevenly rows are distributed.
#pragma once

#include <utility>
#include <vector>

#include "cpu/select.h"
#include "ops/cpu/steps.h"

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

// Matrix `i` of a stack whose matrices have `rows` rows.
inline Matrix matrix_of_stack(const Matrix& stack, int64_t i, int64_t rows) {
  const int64_t bytes = float_bytes(stack.dtype);
  return {stack.tensor, static_cast<const char*>(stack.data) + i * rows * stack.cols * bytes, stack.dtype, rows,
          stack.cols};
}

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
