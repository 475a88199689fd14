// Error of a 4-bit weight against the dense one: sums in double, in a fixed order, without a temporary of the weight's
// size.
#include "cuda/device/elements.cuh"
#include "cuda/device/launch.cuh"

namespace qlora::cuda {
namespace quantization_error {

constexpr int kThreads = 256;
constexpr int kSharedBytes = 3 * kThreads * static_cast<int>(sizeof(double));

struct Sums {
  double squared_error = 0.0, squares = 0.0, largest = 0.0;
  QLORA_METHOD void add(const Sums& other) {
    squared_error += other.squared_error;
    squares += other.squares;
    largest = fmax(largest, other.largest);
  }
};

// Total over the threads of a block, in order; only thread 0 gets it.
QLORA_DEVICE Sums block_total(const Sums& mine) {
  const SharedAddress base = ptx::shared_base(), at = base + ptx::thread() * 24;
  ptx::store_shared(at, mine.squared_error);
  ptx::store_shared(at + 8, mine.squares);
  ptx::store_shared(at + 16, mine.largest);
  ptx::sync_threads();
  Sums total;
  if (ptx::thread() == 0)
#pragma unroll 1
    for (SharedAddress i = 0; i < kThreads; ++i)
      total.add({ptx::load_shared<double>(base + i * 24), ptx::load_shared<double>(base + i * 24 + 8),
                 ptx::load_shared<double>(base + i * 24 + 16)});
  return total;
}

QLORA_DEVICE void store_sums(double* out, const Sums& sums) {
  ptx::store(out, sums.squared_error);
  ptx::store(out + 1, sums.squares);
  ptx::store(out + 2, sums.largest);
}

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) parts(QLORA_PARAMS QuantizationErrorParams p) {
  Sums sums;
  const int64_t numel = p.weight.n * p.weight.k;
  for (int64_t i = ptx::block_x() * int64_t{kThreads} + ptx::thread(); i < numel;
       i += int64_t{kErrorParts} * kThreads) {
    const double exact = load_element(p.exact, p.dtype, i);
    const double difference = fabs(exact - static_cast<double>(weight_at(p.weight, i)));
    sums.add({difference * difference, exact * exact, difference});
  }
  const Sums total = block_total(sums);
  if (ptx::thread() == 0) store_sums(p.parts + 3 * ptx::block_x(), total);
}

QLORA_KERNEL void QLORA_BOUNDS(kThreads, 4) finish(QLORA_PARAMS QuantizationErrorParams p) {
  const double* part = p.parts + 3 * ptx::thread();
  const Sums total = block_total({ptx::load(part), ptx::load(part + 1), ptx::load(part + 2)});
  if (ptx::thread() == 0) store_sums(p.out, total);
}
static_assert(kErrorParts == kThreads, "a part for each thread of the last block");

}  // namespace quantization_error

Status launch_quantization_error(const QuantizationErrorParams& p, cudaStream_t stream) {
  using namespace quantization_error;
  const Status status = start(parts, {kErrorParts}, kThreads, kSharedBytes, stream, p);
  if (status.error != nullptr) return status;
  return start(finish, {1}, kThreads, kSharedBytes, stream, p);
}

}  // namespace qlora::cuda
