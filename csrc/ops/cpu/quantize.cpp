// The ops quantize, dequantize and quantization_error for the CPU: checks, allocation, parallel loops.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "format/half.h"
#include "ops/checks.h"
#include "ops/cpu/common.h"
#include "ops/cpu/scales.h"

namespace qlora::ops_cpu {
namespace {

constexpr int64_t kElementsPerTask = 1 << 16;  // below this a second thread costs more than it saves

float load(const void* values, DType dtype, int64_t i) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(values)[i]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const fp16*>(values)[i]);
  return static_cast<const float*>(values)[i];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(Tensor weight, std::string quant_type, int64_t block_size,
                                                    bool double_quant, bool check_finite) {
  const cpu::KernelTable& kernels = active_kernels();
  const QuantType type = check_quant_type(quant_type);
  check_block_size(block_size);
  const Tensor source = as_contiguous(weight);
  const int64_t numel = source.numel(), blocks = ceil_div(numel, block_size);
  Tensor packed = empty_cpu({packed_bytes(numel)}, ScalarType::Byte);
  Tensor absmax = empty_cpu({blocks}, ScalarType::Float);
  cpu::QuantizeParams p{};
  p.weight = source.const_data_ptr();
  p.dtype = float_dtype(source.scalar_type(), "weight");
  p.numel = numel;
  p.block = block_size;
  p.quant_type = type;
  p.check_finite = check_finite;
  p.packed = packed.mutable_data_ptr<uint8_t>();
  p.absmax = absmax.mutable_data_ptr<float>();
  FirstPosition bad;
  parallel(blocks, std::max<int64_t>(1, kElementsPerTask / block_size),
           [&](int64_t begin, int64_t end) { bad.report(kernels.quantize(p, begin, end)); });
  STD_TORCH_CHECK(!bad.any(), "weight", position_text(bad.value(), source.sizes()),
                  " is nan or inf: only finite weights can be quantized (check_finite=False skips this check)");
  if (double_quant && !check_finite) {  // one infinite scale would make the mean infinite, and so every block
    for (int64_t b = 0; b < blocks; ++b)
      STD_TORCH_CHECK(std::isfinite(p.absmax[b]), "block ", b,
                      " of the weight contains inf: with check_finite=False only", " double_quant=False can store it");
  }
  const auto [scales, nested_absmax, nested_offset] = stored_scales(absmax, double_quant);
  return {packed, scales, nested_absmax, nested_offset};
}

Tensor dequantize(Tensor packed, Tensor absmax, OptionalTensor nested_absmax, OptionalTensor nested_offset,
                  std::vector<int64_t> shape, std::string quant_type, int64_t block_size, ScalarType dtype) {
  const cpu::KernelTable& kernels = active_kernels();
  const int64_t numel = checked_numel(shape);
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, 1, numel, quant_type, block_size);
  cpu::DequantizeParams p{view_of(w), nullptr, float_dtype(dtype, "dtype")};
  const Tensor out = on_huge_pages(torch::stable::empty({shape.data(), shape.size()}, dtype));
  p.out = out.mutable_data_ptr();
  // Ranges consist of whole blocks, so no two threads share a byte.
  const int64_t blocks = ceil_div(numel, block_size);
  parallel(blocks, std::max<int64_t>(1, kElementsPerTask / block_size), [&](int64_t begin, int64_t end) {
    kernels.dequantize(p, begin * block_size, std::min(end * block_size, numel));
  });
  return out;
}

// One pass and no temporary: a Python sum over dequantized chunks would fragment the heap
// (docs/concepts/architecture.md).
Tensor quantization_error(Tensor weight, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                          OptionalTensor nested_offset, std::string quant_type, int64_t block_size) {
  const cpu::KernelTable& kernels = active_kernels();
  const Tensor source = as_contiguous(weight);
  const DType dtype = float_dtype(source.scalar_type(), "weight");
  const int64_t numel = source.numel();
  check_same_device(packed, "packed", source, "weight");
  const CheckedWeight w = check_weight(packed, absmax, nested_absmax, nested_offset, 1, numel, quant_type, block_size);
  const WeightView view = view_of(w);
  struct Sums {
    double squared_error = 0.0, squares = 0.0, largest = 0.0;
  };
  const int64_t tasks = ceil_div(numel, kElementsPerTask);
  std::vector<Sums> sums(static_cast<size_t>(tasks));  // added in order, so the thread count cannot change the result
  parallel(tasks, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kChunk = 1024;
    for (int64_t task = begin; task < end; ++task) {
      Sums& sum = sums[static_cast<size_t>(task)];
      const int64_t last = std::min(numel, (task + 1) * kElementsPerTask);
      for (int64_t first = task * kElementsPerTask; first < last; first += kChunk) {
        float dense[kChunk];
        const int64_t stop = std::min(first + kChunk, last);
        kernels.dequantize({view, dense, DType::kFloat32, first}, first, stop);
        for (int64_t i = first; i < stop; ++i) {
          const double exact = load(source.const_data_ptr(), dtype, i);
          const double difference = std::abs(exact - static_cast<double>(dense[i - first]));
          sum.squared_error += difference * difference;
          sum.squares += exact * exact;
          sum.largest = std::max(sum.largest, difference);
        }
      }
    }
  });
  Sums total;
  for (const Sums& sum : sums) {
    total.squared_error += sum.squared_error;
    total.squares += sum.squares;
    total.largest = std::max(total.largest, sum.largest);
  }
  Tensor out = empty_cpu({3}, ScalarType::Double);
  double* values = out.mutable_data_ptr<double>();
  values[0] = total.squared_error;
  values[1] = total.squares;
  values[2] = total.largest;
  return out;
}

}  // namespace
}  // namespace qlora::ops_cpu

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("quantize", TORCH_BOX(&qlora::ops_cpu::quantize));
  m.impl("dequantize", TORCH_BOX(&qlora::ops_cpu::dequantize));
  m.impl("quantization_error", TORCH_BOX(&qlora::ops_cpu::quantization_error));
}
