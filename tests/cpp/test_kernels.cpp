// Tests every CPU kernel of every ISA that this machine runs: codes and scales against the reference or the scalar
// kernels, bit for bit, and indices beyond 2^31 without allocating that much memory. test_products.cpp and
// test_tiles.cpp test products. Arguments are the levels that the machine is expected to run.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "cpu/isa/dispatch.h"
#include "format/dynamic_map.h"
#include "testing.h"

namespace {

using namespace qlora;
using namespace qlora::cpu;
using namespace qlora::testing;

void test_quantize(const KernelTable& kernels) {
  for (const NamedType& entry : quant_types())
    for (const int64_t block : {32, 64, 4096})
      for (const int64_t numel : {0, 1, 63, 64, 65, 1000, 8193})
        for (const DType dtype : kFloatTypes) {
          std::vector<float> values = normal(numel, static_cast<unsigned>(numel + block));
          if (numel >= 1000)
            for (int i = 64; i < 128; ++i) values[i] = 0.0f;  // a zero block
          if (numel >= 1000) values[200] = 1e-42f;            // subnormal
          const Array weight(dtype, values);
          for (int64_t i = 0; i < numel; ++i) values[i] = weight[i];
          const reference::Quantized expected = reference::quantize(values, block, entry.type);
          reference::Quantized actual{std::vector<uint8_t>(expected.packed.size()),
                                      std::vector<float>(expected.absmax.size())};
          const QuantizeParams p{weight.data(),       dtype, numel, block, entry.type, true, actual.packed.data(),
                                 actual.absmax.data()};
          bool fine = true;
          in_two_ranges(ceil_div(numel, block),
                        [&](int64_t begin, int64_t end) { fine = fine && kernels.quantize(p, begin, end) == -1; });
          expect(fine && actual.packed == expected.packed && actual.absmax == expected.absmax,
                 name_of(kernels, "quantize ", entry.name, " block ", block, " numel ", numel));
        }
}

// Numbers on every threshold and next to it: a tie takes the lower code, or the even one for int4.
void test_codes_next_to_thresholds(const KernelTable& kernels) {
  for (const NamedType& entry : quant_types()) {
    std::vector<float> points(kFp4Thresholds, kFp4Thresholds + 7);
    std::vector<float> levels(codebook(entry.type), codebook(entry.type) + kLevels);
    std::sort(levels.begin(), levels.end());
    for (int i = 0; i + 1 < kLevels; ++i) points.push_back((levels[i] + levels[i + 1]) / 2);
    for (int i = 0; i <= 14; ++i) points.push_back(static_cast<float>(i) / 14.0f);
    std::vector<float> weight;
    for (const float point : points)
      for (const float sign : {-1.0f, 1.0f})
        for (const float x : {std::nextafter(point, -2.0f), point, std::nextafter(point, 2.0f)}) {
          if (weight.size() % 32 == 0) weight.push_back(1.0f);  // the largest magnitude of the block
          weight.push_back(sign * std::min(x, 1.0f));
        }
    const auto numel = static_cast<int64_t>(weight.size());
    const reference::Quantized expected = reference::quantize(weight, 32, entry.type);
    reference::Quantized actual{std::vector<uint8_t>(expected.packed.size()),
                                std::vector<float>(expected.absmax.size())};
    kernels.quantize(
        {weight.data(), DType::kFloat32, numel, 32, entry.type, true, actual.packed.data(), actual.absmax.data()}, 0,
        ceil_div(numel, 32));
    expect(actual.packed == expected.packed, name_of(kernels, "codes next to thresholds of ", entry.name));
  }
}

// Without the check, nan never wins a maximum and gets the lowest code, quiet or signaling; the same on every ISA.
void test_unchecked_nan_and_inf(const KernelTable& kernels) {
  for (const NamedType& entry : quant_types()) {
    std::vector<float> weight = normal(320, 9);
    weight[3] = float_of(0x7FC00000u);
    weight[70] = float_of(0x7FA00001u);
    weight[130] = float_of(0xFFC00000u);
    weight[200] = INFINITY;
    for (int i = 256; i < 320; ++i) weight[i] = NAN;
    std::vector<uint8_t> packed[2];
    std::vector<float> absmax[2];
    for (int i = 0; i < 2; ++i) {
      packed[i].resize(160);
      absmax[i].resize(5);
      const QuantizeParams p{weight.data(),    DType::kFloat32, 320, 64, entry.type, false,
                             packed[i].data(), absmax[i].data()};
      (i == 0 ? *kScalarTable : kernels).quantize(p, 0, 5);
    }
    expect(packed[0] == packed[1] && absmax[0] == absmax[1], name_of(kernels, "unchecked nan of ", entry.name));
  }
}

void test_quantize_names_the_first_bad_value(const KernelTable& kernels) {
  std::vector<float> weight = normal(300, 1);
  weight[130] = NAN;
  weight[250] = INFINITY;
  std::vector<uint8_t> packed(150);
  std::vector<float> absmax(5);
  const QuantizeParams p{weight.data(), DType::kFloat32, 300, 64, QuantType::kNf4, true, packed.data(), absmax.data()};
  expect(kernels.quantize(p, 0, 5) == 130, std::string(kernels.isa) + " first nan");
  expect(kernels.quantize(p, 3, 5) == 250, std::string(kernels.isa) + " inf in a later range");
}

template <class T>
void test_dequantize(const KernelTable& kernels, DType dtype) {
  for (const NamedType& entry : quant_types())
    for (const int64_t block : {32, 64, 512})
      for (const bool nested : {false, true}) {
        const int64_t n = 7, k = 275;
        const Weight weight(n, k, block, entry.type, nested);
        std::vector<T> out(static_cast<size_t>(n * k));
        const DequantizeParams p{weight.view, out.data(), dtype};
        kernels.dequantize(p, 0, 38);  // split in the middle of a block and of a vector
        kernels.dequantize(p, 38, n * k);
        bool equal = true;
        for (int64_t i = 0; i < n * k; ++i) {
          const T expected = from_float<T>(reference::element(weight.view, i));
          equal = equal && std::memcmp(&expected, &out[i], sizeof(T)) == 0;
        }
        expect(equal, name_of(kernels, "dequantize ", entry.name, " block ", block, nested ? " nested" : ""));
      }
}

// Floats between two adjacent 16-bit numbers must round as IEEE requires, on every ISA. The weight 1.0 (code 15 of NF4)
// with absmax = x turns dequantize into a conversion of x.
void test_rounding_to_16_bit(const KernelTable& kernels) {
  std::vector<float> absmax;
  for (uint32_t half = 0; half < 0x7F80; half += 3) absmax.push_back(float_of(half << 16 | (half * 2654435761u >> 16)));
  for (uint32_t half = 0; half < 0x7F80; half += 5) absmax.push_back(float_of(half << 16 | 0x8000));  // ties
  for (uint32_t half = 1; half < 0x7C00; half += 2)
    absmax.push_back(0.5f *
                     (to_float(fp16{static_cast<uint16_t>(half)}) + to_float(fp16{static_cast<uint16_t>(half - 1)})));
  absmax.push_back(65519.9f);
  absmax.push_back(65520.0f);
  absmax.push_back(INFINITY);
  absmax.push_back(float_of(0x7F800001u));  // a signaling nan, and one that a carry would turn into -0
  absmax.push_back(float_of(0x7FFFFFFFu));
  const int64_t blocks = static_cast<int64_t>(absmax.size()), block = 32;
  const std::vector<uint8_t> packed(static_cast<size_t>(blocks * block / 2), 0xFF);
  WeightView w;
  w.packed = packed.data();
  w.absmax = absmax.data();
  w.n = 1;
  w.k = blocks * block;
  w.block_shift = log2_exact(block);
  std::vector<bf16> b(static_cast<size_t>(w.k));
  std::vector<fp16> h(static_cast<size_t>(w.k));
  kernels.dequantize({w, b.data(), DType::kBFloat16}, 0, w.k);
  kernels.dequantize({w, h.data(), DType::kFloat16}, 0, w.k);
  bool bf16_equal = true, fp16_equal = true, fp16_nearest = true;
  for (int64_t i = 0; i < blocks; ++i) {
    bf16_equal = bf16_equal && b[i * block].bits == from_float<bf16>(absmax[i]).bits;
    const fp16 half = from_float<fp16>(absmax[i]);
    fp16_equal = fp16_equal && h[i * block].bits == half.bits;
    if (half.bits < 0x7BFF && half.bits > 0) {  // neither neighbour is nearer, and ties are even
      const double error = std::fabs(static_cast<double>(absmax[i]) - to_float(half));
      for (const int step : {-1, 1}) {
        const double other =
            std::fabs(static_cast<double>(absmax[i]) - to_float(fp16{static_cast<uint16_t>(half.bits + step)}));
        fp16_nearest = fp16_nearest && (error < other || (error == other && half.bits % 2 == 0));
      }
    }
  }
  expect(bf16_equal, std::string(kernels.isa) + " rounding to bfloat16");
  expect(fp16_equal, std::string(kernels.isa) + " rounding to float16");
  expect(fp16_nearest, "float16 conversion rounds to nearest even");
}

// Reserves address space; only pages that are accessed use memory.
template <class T>
T* reserve(int64_t count) {
  void* p = mmap(nullptr, static_cast<size_t>(count) * sizeof(T), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<T*>(p);
}

// Dequantizes and multiplies the last row of a weight of 2^33 elements; n * k and the byte offsets overflow 32 bits.
void test_indices_beyond_32_bits(const KernelTable& kernels) {
  const int64_t k = 4096, n = int64_t{1} << 21, block = 64, numel = n * k, last = n - 1;
  uint8_t* packed = reserve<uint8_t>(packed_bytes(numel));
  float* absmax = reserve<float>(numel / block);
  std::memset(packed + last * k / 2, 0xEE, static_cast<size_t>(k / 2));
  for (int64_t b = last * k / block; b < numel / block; ++b) absmax[b] = 2.0f;
  WeightView w;
  w.packed = packed;
  w.absmax = absmax;
  w.n = n;
  w.k = k;
  w.block_shift = log2_exact(block);
  const float value = kNf4[14] * 2.0f;

  float* out = reserve<float>(numel);
  kernels.dequantize({w, out, DType::kFloat32}, last * k, numel);
  expect(out[last * k] == value && out[numel - 1] == value, std::string(kernels.isa) + " dequantize beyond 2^32");

  const std::vector<float> x(static_cast<size_t>(k), 1.0f);
  std::vector<float> words(static_cast<size_t>(kernels.words_floats(k))), plain(static_cast<size_t>(k));
  kernels.pack_words({x.data(), DType::kFloat32, k, plain.data(), words.data()}, 0, 1);
  float* y = reserve<float>(n);
  GemvParams p{};
  p.weight = w;
  p.m = 1;
  p.x_plain = plain.data();
  p.x_words = words.data();
  p.y = y;
  kernels.gemv(p, last, n, scratch(kernels.gemv_scratch(p)));
  expect(std::fabs(y[last] - k * value) < 1e-2f, std::string(kernels.isa) + " gemv beyond 2^32");

  std::vector<float> columns(static_cast<size_t>(kernels.packed_floats(1, k)));
  kernels.pack({x.data(), DType::kFloat32, k, false, 1, k, columns.data()}, 0, 1);
  Term term;
  term.operand.packed = &w;
  term.columns = columns.data();
  term.steps = k;
  GemmParams g;
  g.terms = &term;
  g.rows = n;
  g.cols = 1;
  g.out = y;
  g.out_ld = n;
  y[last] = 0.0f;
  const int64_t items = kernels.gemm_items(g);
  kernels.gemm(g, items - 1, items, scratch(kernels.gemm_scratch(g)));
  expect(std::fabs(y[last] - k * value) < 1e-2f, std::string(kernels.isa) + " gemm beyond 2^32");

  float* source = reserve<float>(numel);
  source[numel - 1] = -3.0f;
  const QuantizeParams q{source, DType::kFloat32, numel, block, QuantType::kNf4, true, packed, absmax};
  kernels.quantize(q, numel / block - 1, numel / block);
  expect(absmax[numel / block - 1] == 3.0f && packed[numel / 2 - 1] == 0x70,
         std::string(kernels.isa) + " quantize beyond 2^32");
  munmap(packed, static_cast<size_t>(packed_bytes(numel)));
  munmap(absmax, static_cast<size_t>(numel / block) * sizeof(float));
  munmap(out, static_cast<size_t>(numel) * sizeof(float));
  munmap(source, static_cast<size_t>(numel) * sizeof(float));
  munmap(y, static_cast<size_t>(n) * sizeof(float));
}

// Scales and codes of a calibrated weight: equal on every ISA, and for every cut of the range.
void test_calibration(const KernelTable& kernels) {
  const KernelTable& plain = *kScalarTable;
  const int64_t n = 131, k = 45, block = 32, blocks = ceil_div(n * k, block), panels = ceil_div(n, kFeedbackRows);
  const std::vector<float> weight = normal(n * k, 7);
  std::vector<float> importance = normal(k, 10);
  for (float& v : importance) v = v * v;
  const std::vector<float> feedback = normal(k * k, 8);
  std::vector<int64_t> order(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) order[static_cast<size_t>(i)] = (i * 7) % k;
  for (const NamedType& entry : quant_types()) {
    const std::string name = std::string(kernels.isa) + " calibration " + entry.name;
    std::vector<float> absmax[2];
    std::vector<uint8_t> packed[2];
    for (int i = 0; i < 2; ++i) {
      const KernelTable& table = i == 0 ? plain : kernels;
      absmax[i].assign(static_cast<size_t>(blocks), 0.0f);
      packed[i].assign(static_cast<size_t>(packed_bytes(n * k)), 0xFF);
      const SearchScalesParams search{weight.data(), importance.data(), n, k, block, entry.type, absmax[i].data()};
      const bool is_fine = table.search_scales(search, 0, 5) < 0 && table.search_scales(search, 5, blocks) < 0;
      expect(is_fine, name + " finite");
      WeightView scales;
      scales.absmax = absmax[0].data();
      scales.quant_type = entry.type;
      scales.n = n;
      scales.k = k;
      scales.block_shift = log2_exact(block);
      const FeedbackParams p{weight.data(), scales, feedback.data(), order.data(), packed[i].data()};
      table.quantize_with_feedback(p, 1, panels, scratch(table.feedback_scratch(k)));
      table.quantize_with_feedback(p, 0, 1, scratch(table.feedback_scratch(k)));
    }
    expect(absmax[0] == absmax[1], name + " scales");
    expect(packed[0] == packed[1], name + " codes");
  }
}

void test_dynamic_map_is_sorted_and_symmetric() {
  bool sorted = true;
  for (int i = 1; i < kDynamicMapSize; ++i) sorted = sorted && kDynamicMap.value[i - 1] < kDynamicMap.value[i];
  expect(sorted, "dynamic map ascends");
  expect(kDynamicMap.value[127] == 0.0f && kDynamicMap.value[255] == 1.0f, "dynamic map has 0 and 1");
}

void test_double_quantize_of_equal_scales_is_exact() {
  const std::vector<float> absmax(300, 1.5f);
  std::vector<uint8_t> codes(300);
  std::vector<float> nested(2);
  double_quantize(absmax.data(), 300, 1.5f, codes.data(), nested.data(), 0, 2);
  const float offset = 1.5f;
  WeightView w;
  w.absmax_codes = codes.data();
  w.nested_absmax = nested.data();
  w.nested_offset = &offset;
  expect(scale_of_block(w, 0) == 1.5f && scale_of_block(w, 299) == 1.5f, "equal scales survive double quantization");
}

void test_choice_of_the_isa(const std::vector<std::string>& runnable) {
  const auto active = [](const char* name) {
    setenv(kIsaVariable, name, 1);
    const char* bad = nullptr;
    const KernelTable* table = active_table(&bad);
    unsetenv(kIsaVariable);
    return table != nullptr ? std::string(table->isa) : "unknown: " + std::string(bad);
  };
  expect(active("sse9") == "unknown: sse9", "unknown QLORA_CPU_ISA");
  const std::string preferred = isa_name(preferred_isa());
  expect(active("") == preferred, "an empty QLORA_CPU_ISA");
  for (int i = 0; i < kIsaCount; ++i) {
    const char* name = isa_name(static_cast<Isa>(i));
    const bool runs = std::find(runnable.begin(), runnable.end(), name) != runnable.end();
    expect(active(name) == (runs ? name : preferred), std::string("QLORA_CPU_ISA=") + name);
    expect(std::string(kIsaChoices).find(name) != std::string::npos, std::string(name) + " is a choice in messages");
  }
}

void test_table(const KernelTable& kernels) {
  test_quantize(kernels);
  test_codes_next_to_thresholds(kernels);
  test_quantize_names_the_first_bad_value(kernels);
  test_unchecked_nan_and_inf(kernels);
  test_dequantize<float>(kernels, DType::kFloat32);
  test_dequantize<bf16>(kernels, DType::kBFloat16);
  test_dequantize<fp16>(kernels, DType::kFloat16);
  test_rounding_to_16_bit(kernels);
  test_calibration(kernels);
  test_products(kernels);
  test_tiles(kernels);
  test_indices_beyond_32_bits(kernels);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> runnable;
  std::string names;
  for (int i = 0; i < kIsaCount; ++i) {
    const KernelTable* kernels = table_of(static_cast<Isa>(i));
    if (kernels == nullptr) continue;
    runnable.emplace_back(isa_name(static_cast<Isa>(i)));
    names += runnable.back() + " ";
    expect(kernels->isa == runnable.back(), "the table of " + runnable.back() + " has its name");
    test_table(*kernels);
  }
  if (table_of(Isa::kAvx2) != nullptr)  // that of other processors
    test_table(has_one_shuffle_port() ? *kAvx2Table : *kAvx2OneShufflePortTable);
  test_dynamic_map_is_sorted_and_symmetric();
  test_double_quantize_of_equal_scales_is_exact();
  test_choice_of_the_isa(runnable);
  if (count > 1) expect(runnable == std::vector<std::string>(arguments + 1, arguments + count), "levels: " + names);
  std::printf("%s: %d passed, %d failed\n", names.c_str(), checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
