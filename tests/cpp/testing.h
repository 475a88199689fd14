// What the tests share: checks, random inputs of every float type, scratch memory, and sums in double with their error
// bounds.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa/table.h"
#include "cpu/quantize/double_quantize.h"
#include "format/half.h"
#include "format/quant_type_names.h"
#include "reference/reference.h"

namespace qlora::testing {

inline int checks = 0, failures = 0;

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// "avx2 gemv k=75 m=3"
template <class... Parts>
std::string name_of(const cpu::KernelTable& kernels, const Parts&... parts) {
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      return std::to_string(part);
    else
      return std::string(part);
  };
  return (std::string(kernels.isa) + " " + ... + text(parts));
}

struct NamedType {
  std::string name;
  QuantType type;
};
inline std::vector<NamedType> quant_types() {
  std::vector<NamedType> types;
  for (int i = 0; i < kQuantTypeCount; ++i) types.push_back({quant_type_name(quant_type_at(i)), quant_type_at(i)});
  return types;
}

inline constexpr DType kFloatTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline std::vector<float> normal(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& v : x) v = distribution(generator);
  return x;
}

// Numbers stored in one of the float types.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype(dtype), bytes_(static_cast<size_t>(count * size()), 0xFF) {}  // nan
  Array(DType dtype, const std::vector<float>& values) : Array(dtype, static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kFloat32) write(i, values[i]);
      if (dtype == DType::kBFloat16) write(i, from_float<bf16>(values[i]));
      if (dtype == DType::kFloat16) write(i, from_float<fp16>(values[i]));
    }
  }
  float operator[](int64_t i) const {
    return dtype == DType::kFloat32 ? read<float>(i) : dtype == DType::kBFloat16 ? read<bf16>(i) : read<fp16>(i);
  }
  int64_t count() const { return static_cast<int64_t>(bytes_.size()) / size(); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

  const DType dtype;

 private:
  int64_t size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  template <class T>
  void write(size_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof value, &value, sizeof value);
  }
  template <class T>
  float read(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + static_cast<size_t>(i) * sizeof value, sizeof value);
    return to_float(value);
  }
  std::vector<uint8_t> bytes_;
};

// Memory for tiles or packed columns, aligned to 64 bytes and filled with nan.
class Aligned {
 public:
  explicit Aligned(int64_t bytes) : bytes_(static_cast<size_t>(bytes) + 64, 0xFF) {}
  uint8_t* data() {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<uint8_t> bytes_;
};

// Bytes that end where a page begins that cannot be read.
class BeforeForbiddenPage {
 public:
  BeforeForbiddenPage(const void* data, int64_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    pages_ = (static_cast<size_t>(bytes) + page - 1) / page * page + page;
    mapping_ = static_cast<uint8_t*>(mmap(nullptr, pages_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping_ == MAP_FAILED || mprotect(mapping_ + pages_ - page, page, PROT_NONE) != 0) std::abort();
    data_ = mapping_ + pages_ - page - bytes;
    if (bytes > 0) std::memcpy(data_, data, static_cast<size_t>(bytes));  // null is not allowed
  }
  ~BeforeForbiddenPage() { munmap(mapping_, pages_); }
  BeforeForbiddenPage(const BeforeForbiddenPage&) = delete;
  BeforeForbiddenPage& operator=(const BeforeForbiddenPage&) = delete;
  uint8_t* data() const { return data_; }

 private:
  size_t pages_;
  uint8_t *mapping_, *data_;
};

// Scratch memory, aligned to 64 bytes and filled with nan at each call, so that a kernel that reads before it writes
// gives nan. A kernel that goes past its end, rounded to 64 bytes, crashes.
inline float* scratch(int64_t floats) {
  static std::unique_ptr<BeforeForbiddenPage> memory;
  const std::vector<float> nans(static_cast<size_t>(ceil_div(floats, 16) * 16), NAN);
  memory = std::make_unique<BeforeForbiddenPage>(nans.data(), static_cast<int64_t>(nans.size() * sizeof(float)));
  return reinterpret_cast<float*>(memory->data());
}

// A random packed weight [n, k], with or without double quantization.
struct Weight {
  Weight(int64_t n, int64_t k, int64_t block, QuantType type, bool nested = false, unsigned seed = 1)
      : q(reference::quantize(normal(n * k, seed), block, type)) {
    view.packed = q.packed.data();
    view.absmax = q.absmax.data();
    view.quant_type = type;
    view.n = n;
    view.k = k;
    view.block_shift = log2_exact(block);
    if (!nested) return;
    const auto blocks = static_cast<int64_t>(q.absmax.size());
    offset.push_back(cpu::mean(q.absmax.data(), blocks));
    codes.resize(static_cast<size_t>(blocks));
    nested_absmax.resize(static_cast<size_t>(ceil_div(blocks, kNestedBlock)));
    cpu::double_quantize(q.absmax.data(), blocks, offset[0], codes.data(), nested_absmax.data(), 0,
                         ceil_div(blocks, kNestedBlock));
    view.absmax = nullptr;
    view.absmax_codes = codes.data();
    view.nested_absmax = nested_absmax.data();
    view.nested_offset = offset.data();
  }
  Weight(const Weight&) = delete;  // `view` points into the object

  float operator()(int64_t row, int64_t col) const { return reference::element(view, row * view.k + col); }

  reference::Quantized q;
  std::vector<uint8_t> codes;
  std::vector<float> nested_absmax, offset;
  WeightView view;
};

// A sum of products in double, and the sum of their absolute values, which bounds the rounding error of any order.
struct Sum {
  double value = 0.0, absolute = 0.0;
  void add(double product) {
    value += product;
    absolute += std::fabs(product);
  }
};

// One rounding to the type changes a number by at most this share.
inline double unit_roundoff(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-24;
}

// How far a float32 sum may be from the exact one if each product passes through at most this number of roundings
// (docs/concepts/numerics.md). `relative` is an error of each product that float32 does not cause.
inline double error_of(const Sum& sum, int64_t roundings, double relative = 0.0) {
  return (static_cast<double>(roundings + 2) * 0x1p-24 + relative) * sum.absolute;
}

// Whether `actual` is a number within `error` of `value`, rounded to the dtype.
inline bool is_near(float actual, double value, double error, DType dtype) {
  double rounding = dtype == DType::kFloat32 ? 0.0 : unit_roundoff(dtype) * (std::fabs(value) + error);
  if (dtype == DType::kFloat16) rounding += 0x1p-25;  // half the smallest number
  return std::fabs(actual - value) <= error + rounding;
}
inline bool is_near(float actual, const Sum& sum, int64_t roundings, DType dtype) {
  return is_near(actual, sum.value, error_of(sum, roundings), dtype);
}

// The reversed order of `count` rows: kernels read and write rows through lists.
inline std::vector<int64_t> reversed(int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = count - 1 - i;
  return order;
}

// Runs a kernel over [0, count) in two ranges.
inline void in_two_ranges(int64_t count, const std::function<void(int64_t, int64_t)>& run) {
  run(count / 2, count);
  run(0, count / 2);
}

void test_products(const cpu::KernelTable& kernels);  // test_products.cpp
void test_tiles(const cpu::KernelTable& kernels);     // test_tiles.cpp

}  // namespace qlora::testing
