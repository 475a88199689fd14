// Products in float32 (gemv, gemm, dot) and the packing of their tokens, against sums in double.
#include <algorithm>

#include "cpu/select.h"
#include "testing.h"

namespace qlora::testing {
namespace {

using namespace qlora::cpu;

std::vector<float> dense(const Weight& w) {
  std::vector<float> out(static_cast<size_t>(w.view.n * w.view.k));
  for (size_t i = 0; i < out.size(); ++i) out[i] = reference::element(w.view, static_cast<int64_t>(i));
  return out;
}

void test_pack(const KernelTable& kernels) {
  const int64_t ld = 83, rows = 61;
  const std::vector<int64_t> order = reversed(rows);
  for (const DType dtype : kFloatTypes)
    for (const bool steps_are_rows : {false, true})
      for (const int64_t width : {1, 16, 47, 83})
        for (const bool listed : {false, true}) {
          const Array source(dtype, normal(rows * ld, 2));
          const int64_t cols = steps_are_rows ? width : rows, steps = steps_are_rows ? rows : width;
          std::vector<float> out(static_cast<size_t>(kernels.packed_floats(cols, steps)), NAN);
          PackParams p{source.data(), dtype, ld, steps_are_rows, cols, steps, out.data()};
          if (listed) p.row_of = order.data();
          in_two_ranges(ceil_div(cols, kernels.tile_cols),
                        [&](int64_t begin, int64_t end) { kernels.pack(p, begin, end); });
          bool equal = true;
          for (int64_t col = 0; col < ceil_div(cols, kernels.tile_cols) * kernels.tile_cols; ++col)
            for (int64_t step = 0; step < steps; ++step) {
              const int64_t row = steps_are_rows ? step : col, element = steps_are_rows ? col : step;
              const float expected = col < cols ? source[(listed ? rows - 1 - row : row) * ld + element] : 0.0f;
              const int64_t tile = col / kernels.tile_cols, within = col % kernels.tile_cols;
              equal = equal && out[static_cast<size_t>((tile * steps + step) * kernels.tile_cols + within)] == expected;
            }
          expect(equal, name_of(kernels, "pack width ", width, steps_are_rows ? " steps are rows" : ""));
        }
}

// y = x Wᵀ + bias + x_down · lora_b of each token's adapter; tokens in turn have none, the first and the second.
void test_gemv(const KernelTable& kernels, const Weight& w, int64_t m, DType dtype) {
  const int64_t n = w.view.n, k = w.view.k, r = 11;
  const Array x(dtype, normal(m * k, 3)), bias(dtype, normal(n, 4)), lora_b(dtype, normal(2 * n * r, 5));
  const std::vector<float> x_down = normal(m * r, 6), weights = dense(w);
  const std::vector<int64_t> order = reversed(m);
  std::vector<int64_t> adapter_of_token;
  for (int64_t t = 0; t < m; ++t) adapter_of_token.push_back(t % 3 - 1);
  const bool use_words = select_forward(m, k, nullptr) == ForwardKernel::kGemvWords;

  std::vector<float> plain(static_cast<size_t>(m * k), NAN),
      words(static_cast<size_t>(m * kernels.words_floats(k)), NAN);
  PackWordsParams pack{x.data(), dtype, k, plain.data(), use_words ? words.data() : nullptr, order.data()};
  in_two_ranges(m, [&](int64_t begin, int64_t end) { kernels.pack_words(pack, begin, end); });
  Array y(dtype, m * n);
  GemvParams p{};
  p.weight = w.view;
  p.m = m;
  p.x_plain = plain.data();
  p.x_words = pack.x_words;
  p.bias = bias.data();
  p.bias_dtype = dtype;
  p.x_down = x_down.data();
  p.lora_b = lora_b.data();
  p.lora_dtype = dtype;
  p.r = r;
  p.adapter_of_token = adapter_of_token.data();
  p.y = y.data();
  p.dtype = dtype;
  p.out_row_of = order.data();
  in_two_ranges(n, [&](int64_t begin, int64_t end) { kernels.gemv(p, begin, end, scratch(kernels.gemv_scratch(p))); });

  // AVX2 rounds the levels for bfloat16 tokens, times a factor that it divides by at the end (gemv/levels.h).
  const bool rounds_levels = use_words && dtype == DType::kBFloat16 && std::string(kernels.isa) == "avx2";
  const double level_error = rounds_levels ? unit_roundoff(dtype) : 0.0;
  bool near = true;
  for (int64_t t = 0; t < m; ++t)
    for (int64_t row = 0; row < n; ++row) {
      Sum base, rest;
      for (int64_t i = 0; i < k; ++i) base.add(static_cast<double>(x[order[t] * k + i]) * weights[row * k + i]);
      for (int64_t i = 0; i < r && adapter_of_token[t] >= 0; ++i)
        rest.add(static_cast<double>(x_down[t * r + i]) * lora_b[(adapter_of_token[t] * n + row) * r + i]);
      rest.add(bias[row]);
      const double error = error_of(base, k + r + 2, level_error) + error_of(rest, k + r + 2);
      near = near && is_near(y[order[t] * n + row], base.value + rest.value, error, dtype);
    }
  expect(near, name_of(kernels, "gemv ", quant_type_name(w.view.quant_type), " n=", n, " k=", k, " m=", m));
}

// out = scale · (operand · columns + low-rank term of some columns) + bias + addend, where the operand is W, or Wᵀ if
// transposed.
void test_gemm(const KernelTable& kernels, const Weight& w, bool transposed, int64_t cols, DType dtype, bool major) {
  const int64_t rows = transposed ? w.view.k : w.view.n, steps = transposed ? w.view.n : w.view.k, r = 5;
  const float scale = 0.75f;
  const Array x(dtype, normal(cols * steps, 3)), bias(dtype, normal(rows, 4)), factor(dtype, normal(rows * r, 5));
  const std::vector<float> weights = dense(w), addend = normal(cols * rows, 7);
  const std::vector<int64_t> order = reversed(cols);
  const auto pack = [&](const void* source, DType type, int64_t count, int64_t length) {
    std::vector<float> out(static_cast<size_t>(kernels.packed_floats(count, length)), NAN);
    kernels.pack({source, type, length, false, count, length, out.data()}, 0, ceil_div(count, kernels.tile_cols));
    return out;
  };
  // The low-rank term belongs to the second third of the columns. Its packed columns begin at a tile, with zeros.
  const int64_t begin = cols / 3, end = ceil_div(2 * cols, 3);
  const int64_t first_column = begin / kernels.tile_cols * kernels.tile_cols, zeros = begin - first_column;
  std::vector<float> activation = normal((end - first_column) * r, 6);
  std::fill_n(activation.begin(), zeros * r, 0.0f);
  const std::vector<float> columns = pack(x.data(), dtype, cols, steps);
  const std::vector<float> low_rank = pack(activation.data(), DType::kFloat32, end - first_column, r);

  Term terms[2];
  terms[0].operand.packed = &w.view;
  terms[0].columns = columns.data();
  terms[0].steps = steps;
  terms[1].operand.dense = factor.data();
  terms[1].operand.dtype = dtype;
  terms[1].operand.ld = transposed ? rows : r;
  terms[1].columns = low_rank.data();
  terms[1].steps = r;
  terms[1].begin = begin;
  terms[1].end = end;
  terms[1].first_column = first_column;
  Array out(dtype, rows * cols);
  GemmParams p;
  p.terms = terms;
  p.term_count = 2;
  p.transposed = transposed;
  p.rows = rows;
  p.cols = cols;
  p.threads = 1 + cols % 3;
  p.scale = scale;
  p.bias = bias.data();
  p.bias_dtype = dtype;
  p.out = out.data();
  p.out_dtype = dtype;
  p.out_ld = major ? cols : rows;
  p.rows_are_major = major;
  p.out_col_of = major ? nullptr : order.data();
  p.addend = major ? nullptr : addend.data();
  in_two_ranges(kernels.gemm_items(p),
                [&](int64_t first, int64_t last) { kernels.gemm(p, first, last, scratch(kernels.gemm_scratch(p))); });

  bool near = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) {
      Sum sum;
      for (int64_t s = 0; s < steps; ++s)
        sum.add(static_cast<double>(scale) * x[col * steps + s] *
                weights[transposed ? s * rows + row : row * steps + s]);
      for (int64_t i = 0; i < r && begin <= col && col < end; ++i)
        sum.add(static_cast<double>(scale) * activation[(col - first_column) * r + i] *
                factor[transposed ? i * rows + row : row * r + i]);
      sum.add(bias[row]);
      const int64_t out_col = major ? col : order[col];
      if (!major) sum.add(addend[out_col * rows + row]);
      const int64_t roundings = steps + ceil_div(steps, 64) + r + 3;  // sums of panels are added; scale, bias, addend
      near = near && is_near(out[major ? row * cols + col : out_col * rows + row], sum, roundings, dtype);
    }
  expect(near, name_of(kernels, transposed ? "gemm transposed " : "gemm ", quant_type_name(w.view.quant_type),
                       " n=", w.view.n, " k=", w.view.k, " cols=", cols));
}

// An integer matrix [steps, rows] with one scale and zero point for each group of steps and each row.
template <class T>
void test_gemm_of_integers(const KernelTable& kernels, DType dtype) {
  const int64_t rows = 37, steps = 70, group = 14, cols = 11;
  std::vector<T> matrix;
  for (int64_t i = 0; i < rows * steps; ++i) matrix.push_back(static_cast<T>(i * 37 % 101));
  const std::vector<float> x = normal(cols * steps, 3), scale = normal(steps / group * rows, 4);
  const std::vector<float> zero_point = normal(steps / group * rows, 5);
  std::vector<float> columns(static_cast<size_t>(kernels.packed_floats(cols, steps)));
  kernels.pack({x.data(), DType::kFloat32, steps, false, cols, steps, columns.data()}, 0,
               ceil_div(cols, kernels.tile_cols));
  Term term;
  term.operand.dense = matrix.data();
  term.operand.dtype = dtype;
  term.operand.ld = rows;
  term.operand.affine = {scale.data(), zero_point.data(), group, rows, 1};
  term.columns = columns.data();
  term.steps = steps;
  Array out(DType::kFloat32, rows * cols);
  GemmParams p;
  p.terms = &term;
  p.transposed = true;
  p.rows = rows;
  p.cols = cols;
  p.out = out.data();
  p.out_ld = rows;
  kernels.gemm(p, 0, kernels.gemm_items(p), scratch(kernels.gemm_scratch(p)));
  bool near = true;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < cols; ++col) {
      Sum sum;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t cell = s / group * rows + row;
        const float scaled = static_cast<float>(matrix[static_cast<size_t>(s * rows + row)]) * scale[cell];
        const float weight = scaled + zero_point[cell];
        sum.add(static_cast<double>(weight) * x[col * steps + s]);
      }
      near = near && is_near(out[col * rows + row], sum, steps + 2, DType::kFloat32);
    }
  expect(near, name_of(kernels, "gemm of integers of ", sizeof(T), " bytes"));
}

void test_dot(const KernelTable& kernels) {
  const float scale = 1.25f;
  for (const DType dtype : kFloatTypes)
    for (const int64_t k : {1, 16, 75, 301}) {
      const int64_t rows = 9, m = 3;
      const Array matrix(dtype, normal(rows * k, 8));
      const std::vector<float> x = normal(m * k, 9);
      std::vector<float> out(static_cast<size_t>(m * rows), NAN);
      const DotParams p{matrix.data(), dtype, rows, k, x.data(), m, scale, out.data()};
      in_two_ranges(rows, [&](int64_t begin, int64_t end) { kernels.dot(p, begin, end); });
      bool near = true;
      for (int64_t t = 0; t < m; ++t)
        for (int64_t row = 0; row < rows; ++row) {
          Sum sum;
          for (int64_t i = 0; i < k; ++i) sum.add(static_cast<double>(scale) * x[t * k + i] * matrix[row * k + i]);
          near = near && is_near(out[static_cast<size_t>(t * rows + row)], sum, k + 1, DType::kFloat32);
        }
      expect(near, name_of(kernels, "dot k=", k));
    }
}

}  // namespace

void test_products(const KernelTable& kernels) {
  struct Shape {
    int64_t n, k, block;
  };
  test_pack(kernels);
  test_dot(kernels);
  test_gemm_of_integers<int8_t>(kernels, DType::kInt8);
  test_gemm_of_integers<uint8_t>(kernels, DType::kUInt8);
  test_gemm_of_integers<int16_t>(kernels, DType::kInt16);
  test_gemm_of_integers<int32_t>(kernels, DType::kInt32);
  test_gemm_of_integers<int64_t>(kernels, DType::kInt64);
  for (const NamedType& entry : quant_types())
    for (const bool nested : {false, true}) {
      // One weight; one word; rows of words with a last chunk that is partial, and blocks that cross rows; rows that
      // begin inside a byte; more than one run of row_dot_elements; rows that begin with a block, which is a half, one
      // or several chunks.
      for (const Shape& s : {Shape{1, 1, 32},
                             {3, 32, 32},
                             {37, 96, 64},
                             {9, 1056, 128},
                             {7, 75, 32},
                             {3, 613, 256},
                             {37, 128, 32},
                             {41, 576, 64},
                             {11, 640, 128},
                             {3, 8192, 4096}}) {
        const Weight w(s.n, s.k, s.block, entry.type, nested);
        for (const int64_t m : {1, 2, 3, 4, 8}) test_gemv(kernels, w, m, kFloatTypes[m % 3]);
      }
      // More than one panel in both directions; a last panel that ends with an incomplete register tile, or vector. Few
      // columns, one and several blocks of columns, and a block that is too large to be kept in L2.
      for (const Shape& s : {Shape{1, 1, 32}, {37, 96, 64}, {70, 333, 64}, {131, 45, 32}, {63, 127, 64}}) {
        const Weight w(s.n, s.k, s.block, entry.type, nested);
        for (const int64_t cols : {1, 3, 8, 9, 16, 50, 500, 550})
          for (const bool transposed : {false, true})
            test_gemm(kernels, w, transposed, cols, kFloatTypes[cols % 3], (cols + s.n) % 2 == 0);
      }
    }
}

}  // namespace qlora::testing
