// Products of bfloat16 tokens on tiles, against sums in double. Weights are rounded to bfloat16 one by one, as the
// kernels are documented to do, so a tolerance contains only what sums and low-rank terms may lose.
#include "testing.h"

namespace qlora::testing {
namespace {

using namespace qlora::cpu;

constexpr DType kToken = DType::kBFloat16;
// The error of a float32 number that is split into a high and a low bfloat16 half.
constexpr double kSplit = 0x1p-16;

int64_t even(int64_t count) { return count + count % 2; }

// W, rounded to bfloat16, as float32.
std::vector<float> rounded(const Weight& w) {
  std::vector<float> out;
  for (int64_t i = 0; i < w.view.n * w.view.k; ++i)
    out.push_back(to_float(from_float<bf16>(reference::element(w.view, i))));
  return out;
}

// Adapters of one rank and dtype: none (r = 0), one for all tokens, or the first and the third of three, where every
// third token has none.
struct Adapters {
  Adapters(int64_t n, int64_t k, int64_t m, int64_t r, DType dtype, bool mixed)
      : r(r), n(n), k(k), a(dtype, normal(3 * r * k, 21)), b(dtype, normal(3 * n * r, 22)) {
    tiles.scale = scales[0];
    if (!mixed) return;
    for (int64_t t = 0; t < m; ++t) of_token.push_back(t % 3 - 1 + (t % 3 == 2));  // -1, 0, 2
    tiles.count = 2;
    tiles.ids = ids;
    tiles.adapter_of_token = of_token.data();
    tiles.scales = scales;
  }
  Adapters(const Adapters&) = delete;

  int64_t of(int64_t token) const { return of_token.empty() ? 0 : of_token[static_cast<size_t>(token)]; }
  double scale(int64_t id) const { return scales[id]; }
  float a_at(int64_t id, int64_t rank, int64_t col) const { return a[(id * r + rank) * k + col]; }
  float b_at(int64_t id, int64_t row, int64_t rank) const { return b[(id * n + row) * r + rank]; }
  TileFactor down_a() const { return {a.data(), a.dtype, k, 1, r, k, r * k}; }
  TileFactor down_b() const { return {b.data(), b.dtype, 1, r, r, n, n * r}; }
  int64_t steps() const { return tiles.count * low_rank_steps(r, a.dtype); }
  // Products of the low-rank steps, and the roundings of a down projection over `features`.
  int64_t products() const { return tiles.count * low_rank_parts(a.dtype) * even(r); }
  int64_t down_roundings(int64_t features) const { return down_a().splits() * even(features) + 1; }
  // Activations are split; so are float32 factors, twice, and the product of the two low halves is left out.
  double split_error() const { return (a.dtype == DType::kBFloat16 ? 1 : 4) * kSplit; }

  const int64_t r, n, k;
  const Array a, b;
  const float scales[3] = {0.5f, 2.0f, 1.25f};
  const int64_t ids[2] = {0, 2};
  std::vector<int64_t> of_token;
  TileAdapters tiles;
};

std::string describe(const KernelTable& kernels, const char* what, const Weight& w, int64_t m, const Adapters& lora) {
  return name_of(kernels, what, quant_type_name(w.view.quant_type), " n=", w.view.n, " k=", w.view.k, " m=", m,
                 " r=", lora.r, lora.a.dtype == DType::kBFloat16 ? " bfloat16" : "",
                 lora.tiles.count > 1 ? " mixed" : "");
}

Aligned pack_factor(const TileKernels& tiles, const TileFactor& factor, const TileAdapters& adapters, bool as_rows,
                    bool by_nibble) {
  Aligned packed(adapters.count * factor.packed_bytes());
  const PackFactorParams p{factor, adapters, as_rows, by_nibble, packed.data()};
  in_two_ranges(ceil_div(factor.features, kChunk),
                [&](int64_t begin, int64_t end) { tiles.pack_factor(p, begin, end); });
  return packed;
}

// scale · x · factorᵀ of one token: one sum for each rank.
template <class X, class Factor>
std::vector<Sum> down(int64_t r, int64_t features, double scale, const X& x, const Factor& factor) {
  std::vector<Sum> sums(static_cast<size_t>(r));
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = 0; i < features; ++i) sums[static_cast<size_t>(j)].add(scale * x(i) * factor(j, i));
  return sums;
}

// The product of activations with one column of the other factor.
template <class Factor>
Sum up(const std::vector<Sum>& activations, const Factor& factor) {
  Sum sum;
  for (size_t j = 0; j < activations.size(); ++j) {
    sum.value += activations[j].value * factor(static_cast<int64_t>(j));
    sum.absolute += activations[j].absolute * std::fabs(factor(static_cast<int64_t>(j)));
  }
  return sum;
}

// y = x Wᵀ + low-rank term of other tokens, if `dropped`, + bias + addend.
void test_forward(const KernelTable& kernels, const Weight& w, int64_t m, const Adapters& lora, bool dropped) {
  const TileKernels& tiles = *kernels.tiles;
  const int64_t n = w.view.n, k = w.view.k;
  const bool by_nibble = unpacks_by_nibble(w.view);
  const Array x(kToken, normal(m * k, 11)), other(kToken, normal(m * k, 12)), bias(DType::kFloat16, normal(n, 13));
  const Array& lora_x = dropped ? other : x;
  const std::vector<float> addend = normal(m * n, 14), weights = rounded(w);
  const std::vector<int64_t> order = reversed(m);

  Aligned factor = pack_factor(tiles, lora.down_a(), lora.tiles, true, by_nibble);
  Aligned columns(tiles_of(m) * token_steps(k, lora.steps()) * kTileBytes);
  const ForwardTokensParams t{x.data(),
                              m,
                              k,
                              by_nibble,
                              dropped ? other.data() : nullptr,
                              factor.data(),
                              lora.down_a(),
                              lora.tiles,
                              columns.data(),
                              order.data()};
  in_two_ranges(tiles_of(m), [&](int64_t begin, int64_t end) {
    tiles.forward_tokens(t, begin, end, scratch(tiles.forward_tokens_scratch(t)));
  });
  Array y(kToken, m * n);
  ForwardTilesParams p{};
  p.weight = w.view;
  p.m = m;
  p.by_nibble = by_nibble;
  p.columns = columns.data();
  p.lora_b = lora.b.data();
  p.lora_dtype = lora.b.dtype;
  p.r = lora.r;
  p.adapter_stride = n * lora.r;
  p.adapters = lora.tiles;
  p.bias = bias.data();
  p.bias_dtype = bias.dtype;
  p.addend = addend.data();
  p.y = y.data();
  p.out_row_of = order.data();
  in_two_ranges(tiles.forward_items(p),
                [&](int64_t begin, int64_t end) { tiles.forward(p, begin, end, scratch(tiles.forward_scratch(p))); });

  bool near = true;
  const int64_t roundings = even(k) + lora.products() + 2;  // and the sums with bias and addend
  for (int64_t token = 0; token < m; ++token) {
    const int64_t row = order[static_cast<size_t>(token)], id = lora.of(token);
    const std::vector<Sum> x_down = down(
        id < 0 ? 0 : lora.r, k, lora.scale(id < 0 ? 0 : id), [&](int64_t i) { return lora_x[row * k + i]; },
        [&](int64_t j, int64_t i) { return lora.a_at(id, j, i); });
    for (int64_t out = 0; out < n; ++out) {
      Sum base;
      for (int64_t i = 0; i < k; ++i) base.add(static_cast<double>(x[row * k + i]) * weights[out * k + i]);
      base.add(bias[out]);
      base.add(addend[row * n + out]);
      const Sum low_rank = up(x_down, [&](int64_t j) { return static_cast<double>(lora.b_at(id, out, j)); });
      const double error =
          error_of(base, roundings) + error_of(low_rank, roundings + lora.down_roundings(k), lora.split_error());
      near = near && is_near(y[row * n + out], base.value + low_rank.value, error, kToken);
    }
  }
  expect(near, describe(kernels, "tiles forward ", w, m, lora));
}

// dx = dy W + low-rank term, or only the low-rank term; and the activation dy_down.
void test_backward(const KernelTable& kernels, const Weight& w, int64_t m, const Adapters& lora, bool with_weight) {
  const TileKernels& tiles = *kernels.tiles;
  const int64_t n = w.view.n, k = w.view.k, r = lora.r, ranks = lora.tiles.count * r;
  const Array dy(kToken, normal(m * n, 15));
  const std::vector<float> weights = rounded(w);
  const std::vector<int64_t> order = reversed(m);

  Aligned factor = pack_factor(tiles, lora.down_b(), lora.tiles, false, false);
  Aligned rows(tiles_of(m) * token_steps(n, lora.steps()) * kTileBytes);
  Array activation(DType::kFloat32, m * ranks), alone(DType::kFloat32, m * ranks);
  BackwardTokensParams t{
      dy.data(),   m,           n, factor.data(), lora.down_b(), lora.tiles, static_cast<float*>(activation.data()),
      rows.data(), order.data()};
  const auto pack = [&](int64_t begin, int64_t end) {
    tiles.backward_tokens(t, begin, end, scratch(tiles.backward_tokens_scratch(t)));
  };
  in_two_ranges(tiles_of(m), pack);
  t.out = nullptr;
  t.dy_down = static_cast<float*>(alone.data());
  in_two_ranges(tiles_of(m), pack);
  Array dx(kToken, m * k);
  BackwardTilesParams p{};
  p.weight = w.view;
  if (!with_weight) p.weight.packed = nullptr;
  p.m = m;
  p.by_nibble = with_weight && unpacks_by_nibble(w.view);
  p.rows = rows.data();
  p.row_steps = token_steps(n, lora.steps());
  p.lora_a = lora.a.data();
  p.lora_dtype = lora.a.dtype;
  p.r = r;
  p.adapter_stride = r * k;
  p.adapters = lora.tiles;
  p.dx = dx.data();
  p.out_row_of = order.data();
  in_two_ranges(tiles.backward_items(p),
                [&](int64_t begin, int64_t end) { tiles.backward(p, begin, end, scratch(tiles.backward_scratch(p))); });

  bool near = true, near_down = true;
  const int64_t roundings = even(n) + lora.products();
  for (int64_t token = 0; token < m; ++token) {
    const int64_t row = order[static_cast<size_t>(token)], own = lora.of(token);
    std::vector<Sum> dy_down;
    for (int64_t i = 0; i < lora.tiles.count; ++i) {
      const int64_t id = lora.tiles.id(i);
      const std::vector<Sum> sums = down(
          r, n, id == own ? lora.scale(id) : 0.0, [&](int64_t j) { return dy[row * n + j]; },
          [&](int64_t j, int64_t out) { return lora.b_at(id, out, j); });
      for (int64_t j = 0; j < r; ++j)
        near_down = near_down &&
                    is_near(activation[token * ranks + i * r + j], sums[static_cast<size_t>(j)].value,
                            error_of(sums[static_cast<size_t>(j)], lora.down_roundings(n), kSplit), DType::kFloat32);
      if (id == own) dy_down = sums;
    }
    for (int64_t col = 0; col < k; ++col) {
      Sum base;
      for (int64_t i = 0; i < n && with_weight; ++i)
        base.add(static_cast<double>(dy[row * n + i]) * weights[i * k + col]);
      const Sum low_rank = up(dy_down, [&](int64_t j) { return static_cast<double>(lora.a_at(own, j, col)); });
      const double error =
          error_of(base, roundings) + error_of(low_rank, roundings + lora.down_roundings(n), lora.split_error());
      near = near && is_near(dx[row * k + col], base.value + low_rank.value, error, kToken);
    }
  }
  expect(near, describe(kernels, with_weight ? "tiles backward " : "tiles backward, low-rank only ", w, m, lora));
  expect(near_down && activation == alone, describe(kernels, "tiles backward's activation ", w, m, lora));
}

// out = valuesᵀ matrix, for some columns and rows of `values`, in another order than those of `matrix`.
void test_factor_grad(const KernelTable& kernels, int64_t m, int64_t features, int64_t ranks, DType dtype) {
  const TileKernels& tiles = *kernels.tiles;
  const int64_t steps = ceil_div(m, kStep), pitch = ranks + 3, others = 2;
  std::vector<float> values = normal((m + others) * pitch, 16);
  std::vector<int64_t> rows;  // every row but the first and the last
  for (int64_t t = 0; t < m; ++t) rows.push_back(t + 1);
  for (int64_t i = 0; i < pitch; ++i)
    values[static_cast<size_t>(i)] = values[static_cast<size_t>((m + 1) * pitch + i)] = NAN;
  const Array matrix(kToken, normal(m * features, 17));
  const std::vector<int64_t> order = reversed(m);
  Aligned packed(tiles_of(ranks) * 2 * steps * kTileBytes);
  const PackTokenFactorParams pack{values.data() + 2, m, ranks, packed.data(), pitch, rows.data()};
  in_two_ranges(steps, [&](int64_t begin, int64_t end) { tiles.pack_token_factor(pack, begin, end); });
  for (const bool r_is_major : {false, true}) {
    Array out(dtype, ranks * features);
    FactorGradParams p{};
    p.factor = packed.data();
    p.m = m;
    p.r = ranks;
    p.features = features;
    p.matrix = matrix.data();
    p.r_is_major = r_is_major;
    p.out = out.data();
    p.out_dtype = dtype;
    p.row_of = order.data();
    in_two_ranges(ceil_div(features, kGradFeatures), [&](int64_t begin, int64_t end) {
      tiles.factor_grad(p, begin, end, scratch(tiles.factor_grad_scratch(p)));
    });
    bool near = true;
    for (int64_t rank = 0; rank < ranks; ++rank)
      for (int64_t f = 0; f < features; ++f) {
        Sum sum;
        for (int64_t t = 0; t < m; ++t)
          sum.add(static_cast<double>(values[static_cast<size_t>((t + 1) * pitch + 2 + rank)]) *
                  matrix[order[static_cast<size_t>(t)] * features + f]);
        const float actual = out[r_is_major ? rank * features + f : f * ranks + rank];
        near = near && is_near(actual, sum.value, error_of(sum, 2 * even(m), kSplit), dtype);
      }
    expect(near, name_of(kernels, "tiles factor_grad m=", m, " features=", features, " r=", ranks,
                         r_is_major ? " r is major" : ""));
  }
}

// Tokens x [m, k] in nibble order, without an adapter.
Aligned packed_columns(const TileKernels& tiles, const void* x, int64_t m, int64_t k) {
  Aligned columns(tiles_of(m) * token_steps(k, 0) * kTileBytes);
  ForwardTokensParams t{};
  t.x = x;
  t.m = m;
  t.k = k;
  t.by_nibble = true;
  t.out = columns.data();
  tiles.forward_tokens(t, 0, tiles_of(m), scratch(tiles.forward_tokens_scratch(t)));
  return columns;
}

// A token that is not finite leaves the others of its tile alone.
void test_nan_stays_in_its_row(const KernelTable& kernels) {
  const TileKernels& tiles = *kernels.tiles;
  const int64_t m = 20, n = 40, k = 128, bad = 5;
  const Weight w(n, k, 64, QuantType::kNf4);
  std::vector<float> values = normal(m * k, 18);
  values[bad * k + 3] = INFINITY;
  values[bad * k + 64] = NAN;
  const Array x(kToken, values);
  Aligned columns = packed_columns(tiles, x.data(), m, k);
  Array y(kToken, m * n);
  ForwardTilesParams p{};
  p.weight = w.view;
  p.m = m;
  p.by_nibble = true;
  p.columns = columns.data();
  p.y = y.data();
  tiles.forward(p, 0, tiles.forward_items(p), scratch(tiles.forward_scratch(p)));
  bool right = true;
  for (int64_t i = 0; i < m * n; ++i) right = right && std::isnan(y[i]) == (i / n == bad);
  expect(right, name_of(kernels, "nan of one token stays its own"));
}

// Weights, bias and addend end with the last row, far from a multiple of the rows that are computed together.
void test_reads_end_with_the_data(const KernelTable& kernels, int64_t n, int64_t m) {
  const TileKernels& tiles = *kernels.tiles;
  const int64_t k = 64;
  const Weight w(n, k, 64, QuantType::kNf4);
  const Array x(kToken, normal(m * k, 18)), bias(DType::kBFloat16, normal(n, 13));
  const std::vector<float> addend = normal(m * n, 14);
  const BeforeForbiddenPage packed_end(w.view.packed, n * k / 2), bias_end(bias.data(), 2 * n),
      addend_end(addend.data(), 4 * m * n), x_end(x.data(), 2 * m * k);
  Aligned columns = packed_columns(tiles, x_end.data(), m, k);
  Array y(kToken, m * n), same(kToken, m * n);
  ForwardTilesParams p{};
  p.weight = w.view;
  p.m = m;
  p.by_nibble = true;
  p.columns = columns.data();
  p.bias = bias.data();
  p.bias_dtype = bias.dtype;
  p.addend = addend.data();
  p.y = same.data();
  tiles.forward(p, 0, tiles.forward_items(p), scratch(tiles.forward_scratch(p)));
  p.weight.packed = packed_end.data();
  p.bias = bias_end.data();
  p.addend = reinterpret_cast<const float*>(addend_end.data());
  p.y = y.data();
  tiles.forward(p, 0, tiles.forward_items(p), scratch(tiles.forward_scratch(p)));
  bool right = true;
  for (int64_t i = 0; i < m * n; ++i) right = right && y[i] == same[i];
  expect(right, name_of(kernels, "reads end with the data, n=", n, " m=", m));
}

}  // namespace

void test_tiles(const KernelTable& kernels) {
  if (kernels.tiles == nullptr) return;
  struct Shape {
    int64_t n, k, block;
  };
  test_nan_stays_in_its_row(kernels);
  for (const int64_t n : {16, 20, 47, 64})
    for (const int64_t m : {3, 20, 40}) test_reads_end_with_the_data(kernels, n, m);
  // One weight; rows that start inside a byte; whole words with half a chunk left over; blocks of two chunks' halves;
  // blocks of 32; more than one chunk of the reduction and more than one panel, in either direction.
  const Shape shapes[] = {{1, 1, 32}, {37, 75, 32}, {70, 192, 64}, {33, 320, 128}, {50, 96, 32}, {300, 704, 64}};
  for (const NamedType& entry : quant_types())
    for (const Shape& s : shapes) {
      const bool large = s.n == 300, nested = s.n % 2 == 1;
      const Weight w(s.n, s.k, s.block, entry.type, nested);
      // Few tokens, a whole tile, more than a pair of tiles. (AMX has another kernel for up to 32.)
      for (const int64_t m : {1, 16, 21, 39}) {
        if (large && m != 39) continue;
        const Adapters none(s.n, s.k, m, 0, DType::kFloat32, false), one(s.n, s.k, m, 5, DType::kBFloat16, false),
            mixed(s.n, s.k, m, 17, DType::kFloat32, true);
        for (const Adapters* lora : {&none, &one, &mixed}) {
          test_forward(kernels, w, m, *lora, lora == &mixed);
          test_backward(kernels, w, m, *lora, true);
        }
        test_backward(kernels, w, m, mixed, false);
      }
    }
  // More tokens than a block: 256 forward, 512 backward.
  const Weight w(33, 64, 64, QuantType::kNf4);
  const Adapters lora(33, 64, 530, 16, DType::kFloat16, false);
  test_forward(kernels, w, 530, lora, false);
  test_backward(kernels, w, 530, lora, true);
  for (const int64_t m : {1, 32, 45})
    for (const int64_t features : {1, 64, 150}) {
      test_factor_grad(kernels, m, features, 5, DType::kFloat32);
      test_factor_grad(kernels, m, features, 36, DType::kBFloat16);
    }
}

}  // namespace qlora::testing
