// Products for few tokens on the CPU: reorders x for the `gemv` kernel, computes the low-rank term by dot products
// and runs `gemv` over the rows of W.
#pragma once

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/gemm.h"

namespace qlora::ops_cpu {

constexpr int64_t kWeightsPerTask = 1 << 15;  // below this a second thread costs more than it saves

inline int64_t rows_per_task(int64_t k) { return std::max<int64_t>(1, kWeightsPerTask / std::max<int64_t>(1, k)); }

// The tokens as float32, in natural order and, if with_words, also in the nibble order of the words of W.
struct TokenFloats {
  Tensor storage;
  const float* plain;  // [m, k]
  const float* words;  // [m, words_floats(k)] or null

  TokenFloats(const cpu::KernelTable& kernels, const Matrix& m, bool with_words)
      : storage(empty_cpu({m.rows * (m.cols + (with_words ? kernels.words_floats(m.cols) : 0))}, ScalarType::Float)) {
    float* data = storage.mutable_data_ptr<float>();
    float* word_data = with_words ? data + m.rows * m.cols : nullptr;
    kernels.pack_words({m.data, m.dtype, m.cols, data, word_data}, 0, m.rows);
    plain = data;
    words = word_data;
  }
};

// out [m, r] = scale * x aᵀ.
inline void low_rank_down_gemv(const cpu::KernelTable& kernels, const Matrix& a, const float* x_plain, int64_t m,
                               float scale, float* out) {
  const cpu::DotParams p{a.data, a.dtype, a.rows, a.cols, x_plain, m, scale, out};
  parallel(p.rows, rows_per_task(p.k), [&](int64_t begin, int64_t end) { kernels.dot(p, begin, end); });
}

// The low-rank term of a `gemv` call: scaled activations and the up projections.
struct GemvAdapterTerm {
  const float* x_down;  // [m, r]
  const void* b;        // [n, r], or [adapters, n, r]
  DType dtype;
  int64_t r;
  const int64_t* adapter_of_token;  // [m] or null
};

inline Tensor run_gemv(const cpu::KernelTable& kernels, const WeightView& w, const Matrix& x, const TokenFloats& floats,
                       const GemvAdapterTerm* lora, const std::optional<Matrix>& bias, const Tensor& like) {
  cpu::GemvParams p{};
  p.weight = w;
  p.m = x.rows;
  p.x_plain = floats.plain;
  p.x_words = floats.words;
  if (bias) {
    p.bias = bias->data;
    p.bias_dtype = bias->dtype;
  }
  if (lora != nullptr) {
    p.x_down = lora->x_down;
    p.lora_b = lora->b;
    p.lora_dtype = lora->dtype;
    p.r = lora->r;
    p.adapter_of_token = lora->adapter_of_token;
  }
  Tensor y = empty_with_last_dim(like, w.n, like.scalar_type());
  p.y = y.mutable_data_ptr();
  p.dtype = x.dtype;
  parallel(w.n, rows_per_task(w.k),
           [&](int64_t begin, int64_t end) { kernels.gemv(p, begin, end, thread_scratch(kernels.gemv_scratch(p))); });
  return y;
}

}  // namespace qlora::ops_cpu
