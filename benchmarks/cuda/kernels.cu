// Runs the tensor-core kernels of csrc/cuda without torch: checks them against the general path, times all tiles, or
// runs one kernel for a profiler or a sanitizer. `make gpu-check` builds and runs it.
//
//   kernels peak                       this GPU's rates of memory reads and of mma.sync
//   kernels check [small]              every kernel and tile against the general path; small: a few shapes
//   kernels sweep [n k …]              times as CSV: graph replays over weights that rotate beyond L2, medians of five
//   kernels one KERNEL TILE m n k [times]
//
// TILE is, for gemv, 16 or 32 rows (32 only for more than 8 tokens); for gemm and gemm_dx, a number of GemmTile; for
// lora_down, tokens; for lora_grad, parts; for dequantize, panels. 0: select.h chooses.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/ptx.cuh"
#include "cuda/launch.h"

using namespace qlora;
using namespace qlora::cuda;

namespace {

constexpr int64_t kMostTokens = 8192, kMostFeatures = 16384;
constexpr int kRank = 16;
constexpr double kTolerance = 6e-3;  // for bfloat16: results rounded to 8 bits, plus rounded levels and sums
constexpr int kMillisecondsPerTiming = 12;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(3);
}
void require(Status status, const char* what) {
  if (status.error == nullptr) return;
  std::printf("FAIL %s: %s\n", what, status.error);
  std::exit(3);
}

// ---- random data ----

__device__ uint32_t random_bits(uint64_t i, uint32_t seed) {
  uint64_t z = i * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>(z >> 32);
}
__device__ float uniform(uint64_t i, uint32_t seed) { return random_bits(i, seed) * 2.3283064e-10f; }
__device__ float normal(uint64_t i, uint32_t seed) {
  const float u = fminf(uniform(2 * i, seed) + 1e-10f, 1.0f);
  return sqrtf(-2 * logf(u)) * cospif(2 * uniform(2 * i + 1, seed));
}

template <class Value>
__global__ void fill(int64_t count, Value value) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) value(i);
}

// Device memory that is never freed.
template <class T>
T* device_array(int64_t count) {
  void* data = nullptr;
  require(cudaMalloc(&data, std::max<int64_t>(count, 1) * sizeof(T) + 256), "cudaMalloc");
  return static_cast<T*>(data);
}
uint8_t* random_bytes(int64_t count, uint32_t seed, int low = 0, int span = 256) {
  auto* p = device_array<uint8_t>(count);
  fill<<<1024, 256>>>(count,
                      [=] __device__(int64_t i) { p[i] = static_cast<uint8_t>(low + random_bits(i, seed) % span); });
  return p;
}
float* random_floats(int64_t count, uint32_t seed, float low, float span) {
  auto* p = device_array<float>(count);
  fill<<<256, 256>>>(count, [=] __device__(int64_t i) { p[i] = low + span * uniform(i, seed); });
  return p;
}
uint16_t* random_bfloat16(int64_t count, uint32_t seed, float scale) {
  auto* p = device_array<uint16_t>(count);
  fill<<<2048, 256>>>(count, [=] __device__(int64_t i) {
    const uint32_t bits = __float_as_uint(normal(i, seed) * scale);
    p[i] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  });
  return p;
}

// ---- operands and calls ----

struct Bench {
  cudaStream_t stream = nullptr;
  GpuInfo gpu;
  uint16_t *tokens, *out, *lora_b;  // bfloat16
  float *activation, *factors, *floats;

  Bench() {
    require(cudaSetDevice(0), "cudaSetDevice");
    require(cudaStreamCreate(&stream), "cudaStreamCreate");
    require(query_gpu(0, &gpu), "query_gpu");
    const int64_t most = kMostTokens * kMostFeatures;
    tokens = random_bfloat16(most, 1, 1.0f);
    out = device_array<uint16_t>(most);
    lora_b = random_bfloat16(kRank * kMostFeatures, 3, 0.02f);
    activation = random_floats(kMostTokens * kRank, 4, -1, 2);
    factors = random_floats(kRank * kMostFeatures, 2, -0.02f, 0.04f);
    floats = device_array<float>(most);
    require(cudaDeviceSynchronize(), "random data");
  }
};

// `copies` random NF4 weights (n, k) in blocks of 64, double-quantized.
std::vector<WeightView> random_weights(int64_t n, int64_t k, int copies) {
  std::vector<WeightView> weights;
  const int64_t blocks = n * k / 64, nested = (blocks + 255) / 256;
  for (int i = 0; i < copies; ++i) {
    WeightView w;
    w.packed = random_bytes(n * k / 2, 7 + i);
    w.absmax_codes = random_bytes(blocks, 99 + i, 64, 192);
    w.nested_absmax = random_floats(nested, 5, 0.005f, 0.01f);
    w.nested_offset = random_floats(1, 3, 0.03f, 0.0f);
    w.n = n;
    w.k = k;
    w.block_shift = 6;
    weights.push_back(w);
  }
  require(cudaDeviceSynchronize(), "random weights");
  return weights;
}
void release(std::vector<WeightView>& weights) {
  for (const WeightView& w : weights)
    for (const void* p : {static_cast<const void*>(w.packed), static_cast<const void*>(w.absmax_codes),
                          static_cast<const void*>(w.nested_absmax), static_cast<const void*>(w.nested_offset)})
      cudaFree(const_cast<void*>(p));
}

using Call = std::function<void(const WeightView&)>;

Call gemv_call(const Bench& b, int rows, int64_t m) {
  return [=](const WeightView& w) {
    GemvParams p{};
    p.weight = w;
    p.x = b.tokens;
    p.dtype = DType::kBFloat16;
    p.m = m;
    p.adapters = 1;
    p.lora_dtype = DType::kBFloat16;
    p.y = b.out;
    p.tile = select_gemv_tile(m, w.n, w.k, b.gpu);
    if (rows != 0) {
      const int64_t room = (b.gpu.shared_bytes_per_block - gemv_shared_bytes(rows, m, 0)) / (4 * rows);
      const int64_t longest = std::min<int64_t>(room, kGemvMostPanelChunks), chunks = w.k / 64;
      p.tile = {rows, static_cast<int>(chunks <= longest ? chunks : longest / kGemvWarps * kGemvWarps)};
    }
    require(launch_gemv(p, b.stream), "gemv");
  };
}

GemmOutput output(const Bench& b, int64_t m, int64_t rows) {
  GemmOutput out{};
  out.y = b.out;
  out.m = m;
  out.rows = rows;
  out.adapters = 1;
  return out;
}

// The tiles that fit into this GPU's shared memory.
std::vector<int> gemm_tiles(const GpuInfo& gpu) {
  if (gpu.shared_bytes_per_block < 96 * 1024) return {0};
  std::vector<int> tiles{static_cast<int>(GemmTile::k64x32Small), static_cast<int>(GemmTile::k128x64)};
  if (gpu.shared_bytes_per_block >= 160 * 1024)
    tiles.insert(tiles.end(), {static_cast<int>(GemmTile::k64x32), static_cast<int>(GemmTile::k64x64)});
  if (gpu.has_wgmma)
    tiles.insert(tiles.end(), {static_cast<int>(GemmTile::k128x64Wgmma), static_cast<int>(GemmTile::k128x128Wgmma)});
  return tiles;
}

Call gemm_call(const Bench& b, int tile, int64_t m) {
  return [=](const WeightView& w) {
    GemmParams p{};
    p.weight = w;
    p.x = b.tokens;
    p.dtype = DType::kBFloat16;
    p.tile = tile != 0 ? static_cast<GemmTile>(tile) : select_gemm_tile(m, w.n, b.gpu);
    p.out = output(b, m, w.n);
    require(launch_gemm(p, b.stream), "gemm");
  };
}

Call gemm_dx_call(const Bench& b, int tile, int64_t m) {
  return [=](const WeightView& w) {
    GemmDxParams p{};
    p.weight = w;
    p.dy = b.tokens;
    p.dtype = DType::kBFloat16;
    p.tile = tile != 0 ? static_cast<GemmTile>(tile) : select_gemm_tile(m, w.k, b.gpu);
    p.out = output(b, m, w.k);
    require(launch_gemm_dx(p, b.stream), "gemm_dx");
  };
}

Call dequantize_call(const Bench& b, int panels) {
  return [=](const WeightView& w) {
    const int64_t rows = w.n / std::max(panels, 1);
    for (int64_t first = 0; first < w.n; first += rows)
      require(launch_dequantize({w, first * w.k, 1, rows * w.k, w.k, b.out, DType::kBFloat16}, b.stream), "dequantize");
  };
}

LowRankFactor factor_a(const Bench& b, int64_t features) { return {b.factors, DType::kFloat32, features, 1, 0, true}; }

Call lora_down_call(const Bench& b, int tokens, int64_t m) {
  return [=](const WeightView& w) {
    LoraDownParams p{};
    p.job[0] = {b.tokens, w.k, factor_a(b, w.k), b.floats, nullptr};
    p.count = 1;
    p.dtype = DType::kBFloat16;
    p.m = m;
    p.r = kRank;
    p.scale = 1.0f;
    p.tokens_per_block = tokens != 0 ? tokens : select_lora_down_tokens(m, kRank, b.gpu);
    require(launch_lora_down(p, b.stream), "lora_down");
  };
}

Call lora_grad_call(const Bench& b, int parts, int64_t m) {
  return [=](const WeightView& w) {
    LoraGradParams p{};
    LoraGradJob& job = p.job[0];
    job.x = b.tokens;
    job.features = w.k;
    job.activations = b.activation;
    job.parts = parts != 0 ? parts : select_lora_grad_parts(m, w.k, kRank, 1, b.gpu);
    job.out = b.floats;
    job.rank_stride = w.k;
    job.feature_stride = 1;
    p.count = 1;
    p.dtype = DType::kBFloat16;
    p.m = m;
    p.ranks = kRank;
    p.splits = true;
    p.ranks_per_block = select_lora_grad_ranks(kRank);
    require(launch_lora_grad(p, b.stream), "lora_grad");
  };
}

Call lora_up_call(const Bench& b, int64_t m) {
  return [=](const WeightView& w) {
    LoraUpParams p{};
    p.dtype = DType::kBFloat16;
    p.out = output(b, m, w.k);
    p.out.up = factor_a(b, w.k);
    p.out.activations = b.activation;
    p.out.r = kRank;
    require(launch_lora_up(p, b.stream), "lora_up");
  };
}

Call call_of(const Bench& b, const std::string& kernel, int tile, int64_t m) {
  if (kernel == "gemv") return gemv_call(b, tile, m);
  if (kernel == "gemm") return gemm_call(b, tile, m);
  if (kernel == "gemm_dx") return gemm_dx_call(b, tile, m);
  if (kernel == "dequantize") return dequantize_call(b, tile);
  if (kernel == "lora_down") return lora_down_call(b, tile, m);
  if (kernel == "lora_grad") return lora_grad_call(b, tile, m);
  if (kernel == "lora_up") return lora_up_call(b, m);
  std::printf("unknown kernel %s\n", kernel.c_str());
  std::exit(2);
}

// ---- check ----

__global__ void add_errors(const uint16_t* ours, const float* right, int64_t count, double* sums) {
  double wrong = 0, all = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const float value = __uint_as_float(uint32_t{ours[i]} << 16), expected = right[i];
    const double difference = static_cast<double>(value) - expected;
    wrong += value == value ? difference * difference : 1e30;  // nan: the kernel did not write it
    all += static_cast<double>(expected) * expected;
  }
  atomicAdd(sums, wrong);
  atomicAdd(sums + 1, all);
}

// ‖ours - right‖ / ‖right‖, where `right` comes from the general path.
double relative_error(const Bench& b, const std::string& kernel, int tile, int64_t m, const WeightView& w) {
  const bool is_dx = kernel == "gemm_dx";
  const int64_t rows = is_dx ? w.k : w.n, steps = is_dx ? w.n : w.k;
  require(cudaMemset(b.out, 0xFF, m * rows * 2), "poison");
  call_of(b, kernel, tile, m)(w);
  GeneralParams g;
  g.kind = is_dx ? OperandKind::kPackedTransposed : OperandKind::kPacked;
  g.weight = w;
  g.columns = {b.tokens, DType::kBFloat16, steps, 1};
  g.rows = rows;
  g.cols = m;
  g.steps = steps;
  g.out = b.floats;
  g.out_row_stride = 1;
  g.out_col_stride = rows;
  require(launch_general(g, b.stream), "general");
  static double* sums = device_array<double>(2);
  require(cudaMemset(sums, 0, 2 * sizeof(double)), "cudaMemset");
  require(cudaStreamSynchronize(b.stream), kernel.c_str());
  add_errors<<<256, 256>>>(b.out, b.floats, m * rows, sums);
  double host[2];
  require(cudaMemcpy(host, sums, sizeof host, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return std::sqrt(host[0] / host[1]);
}

int check(const Bench& b, bool small) {
  int bad = 0;
  std::vector<std::pair<int64_t, int64_t>> shapes{{264, 2112}};
  std::vector<int64_t> counts{1, 9, 65, 200};
  if (!small) shapes.insert(shapes.end(), {{1000, 576}, {4096, 4096}}), counts = {1, 7, 8, 9, 16, 17, 64, 65, 200, 513};
  for (const auto& [n, k] : shapes) {
    std::vector<WeightView> weights = random_weights(n, k, 1);
    for (const int64_t m : counts) {
      const auto one = [&](const char* kernel, int tile) {
        const double error = relative_error(b, kernel, tile, m, weights[0]);
        const bool fine = error < kTolerance;
        bad += !fine;
        if (!fine || m == 200)
          std::printf("%s %s tile %d m %lld n %lld k %lld: %.2e\n", fine ? "ok  " : "FAIL", kernel, tile,
                      static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k), error);
      };
      if (m <= kGemvTokens)
        for (const int rows : {16, 32})
          if (rows == 16 || m > 8) one("gemv", rows);
      for (const char* kernel : {"gemm", "gemm_dx"})
        for (const int tile : gemm_tiles(b.gpu)) one(kernel, tile);
      for (const char* kernel : {"lora_down", "lora_grad", "lora_up", "dequantize"})
        call_of(b, kernel, 0, m)(weights[0]);
      require(cudaStreamSynchronize(b.stream), "low-rank kernels");
    }
    release(weights);
  }
  std::printf("%s\n", bad > 0 ? "CHECK FAILED" : "check passed");
  return bad > 0;
}

// ---- times ----

class Stopwatch {
 public:
  Stopwatch() {
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
  }
  template <class Work>
  double milliseconds(cudaStream_t stream, const Work& work) {
    require(cudaEventRecord(begin_, stream), "cudaEventRecord");
    work();
    require(cudaEventRecord(end_, stream), "cudaEventRecord");
    require(cudaEventSynchronize(end_), "timed work");
    float result = 0;
    require(cudaEventElapsedTime(&result, begin_, end_), "cudaEventElapsedTime");
    return result;
  }

 private:
  cudaEvent_t begin_, end_;
};

// Microseconds per call: the median of five groups of graph replays; each replay runs over all weights.
double microseconds(const Bench& b, const Call& call, const std::vector<WeightView>& weights) {
  call(weights[0]);  // loads the module
  require(cudaStreamSynchronize(b.stream), "warm-up");
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  require(cudaStreamBeginCapture(b.stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (const WeightView& w : weights) call(w);
  require(cudaStreamEndCapture(b.stream, &graph), "capture");
  require(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
  static Stopwatch watch;
  const auto run = [&](int times) {
    return watch.milliseconds(b.stream, [&] {
      for (int i = 0; i < times; ++i) require(cudaGraphLaunch(replay, b.stream), "cudaGraphLaunch");
    });
  };
  run(1);
  const int times = std::max(1, static_cast<int>(kMillisecondsPerTiming / 5.0 / std::max(run(1), 1e-3)));
  std::vector<double> medians;
  for (int i = 0; i < 5; ++i) medians.push_back(run(times) / times / static_cast<double>(weights.size()) * 1e3);
  std::sort(medians.begin(), medians.end());
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  return medians[2];
}

void sweep_shape(const Bench& b, int64_t n, int64_t k, double l2_bytes) {
  const int copies = std::clamp(static_cast<int>(3 * l2_bytes / (n * k / 2.0)) + 1, 2, 64);
  std::vector<WeightView> weights = random_weights(n, k, copies);
  const double weight_bytes = n * k * (0.5 + 1 / 64.0);
  const auto row = [&](const char* kernel, int tile, int64_t m, double bytes, double flops) {
    const double us = microseconds(b, call_of(b, kernel, tile, m), weights);
    std::printf("%s,%d,%lld,%lld,%lld,%.2f,%.0f,%.0f\n", kernel, tile, static_cast<long long>(m),
                static_cast<long long>(n), static_cast<long long>(k), us, bytes / us / 1e3, flops / us / 1e6);
    std::fflush(stdout);
  };
  const auto product = [&](const char* kernel, int tile, int64_t m) {
    row(kernel, tile, m, weight_bytes + 2.0 * m * (n + k), 2.0 * m * n * k);
  };
  for (const int64_t m : {1, 2, 4, 8, 12, 16})
    for (const int rows : {16, 32})
      if (rows == 16 || m > 8) product("gemv", rows, m);
  for (const int64_t m : {16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048})
    for (const char* kernel : {"gemm", "gemm_dx"})
      for (const int tile : gemm_tiles(b.gpu)) product(kernel, tile, m);
  for (const int panels : {1, 2, 4}) row("dequantize", panels, 0, weight_bytes + 2.0 * n * k, 0);
  for (const int64_t m : {1, 16, 128, 2048, 8192})
    for (const int tokens : {16, 32}) row("lora_down", tokens, m, 2.0 * m * k, 2.0 * kRank * m * k);
  for (const int64_t m : {128, 512, 2048, 8192})
    for (const int parts : {0, 1, 4, 16, 32}) row("lora_grad", parts, m, 2.0 * m * k, 2.0 * kRank * m * k);
  for (const int64_t m : {128, 512, 2048, 8192}) row("lora_up", 0, m, 2.0 * m * k, 2.0 * kRank * m * k);
  release(weights);
}

void sweep(const Bench& b, std::vector<std::pair<int64_t, int64_t>> shapes) {
  if (shapes.empty()) shapes = {{4096, 4096}, {14336, 4096}, {4096, 14336}, {1024, 4096}, {8192, 8192}};
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("kernel,tile,m,n,k,us,GB/s,TFLOP/s\n");
  for (const auto& [n, k] : shapes) sweep_shape(b, n, k, properties.l2CacheSize);
}

// ---- peaks ----

__global__ void read_all(const uint4* data, int64_t count, uint32_t* out) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  uint32_t seen = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i + 3 * step < count; i += 4 * step) {
    const uint4 a = data[i], b = data[i + step], c = data[i + 2 * step], d = data[i + 3 * step];
    seen ^= a.x ^ b.y ^ c.z ^ d.w ^ a.w ^ b.x ^ c.y ^ d.z;
  }
  if (seen == 0x12345678) *out = seen;
}

constexpr int kProducts = 12, kMmaRounds = 20000, kMmaFlops = 2 * 16 * 8 * 16;
__global__ void __launch_bounds__(256, 2) multiply(float* out) {
  float sums[kProducts][4] = {};
  const uint32_t fragment[4] = {threadIdx.x, 1, 2, 3};
  for (int round = 0; round < kMmaRounds; ++round)
#pragma unroll
    for (int i = 0; i < kProducts; ++i) ptx::mma<bf16>(sums[i], fragment, static_cast<uint32_t>(i), 5u, sums[i]);
  float total = 0;
  for (const auto& sum : sums) total += sum[0] + sum[3];
  if (total == 1.2345f) *out = total;
}

void peak(const Bench& b) {
  constexpr int64_t kBytes = int64_t{2} << 30;
  const auto* big = reinterpret_cast<uint4*>(device_array<uint8_t>(kBytes));
  Stopwatch watch;
  double read_ms = 1e9, multiply_ms = 1e9;
  for (int i = 0; i < 3; ++i) {
    read_ms = std::min(read_ms, watch.milliseconds(b.stream, [&] {
      read_all<<<b.gpu.sm_count * 8, 512, 0, b.stream>>>(big, kBytes / 16, reinterpret_cast<uint32_t*>(b.floats));
    }));
    multiply_ms =
        std::min(multiply_ms,
                 watch.milliseconds(b.stream, [&] { multiply<<<b.gpu.sm_count * 2, 256, 0, b.stream>>>(b.floats); }));
  }
  require(cudaGetLastError(), "peak");
  const double flops = double(b.gpu.sm_count) * 2 * 8 * kMmaRounds * kProducts * kMmaFlops;
  std::printf("read %.0f GB/s\nmma.sync %.0f TFLOP/s\n", kBytes / read_ms / 1e6, flops / multiply_ms / 1e9);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  const auto number = [&](size_t i) { return i < words.size() ? std::atoll(words[i].c_str()) : 0; };
  const std::string mode = words.empty() ? "check" : words[0];
  const Bench bench;
  std::printf("# arch %d, %d SMs, %d bytes of shared memory a block\n", bench.gpu.arch, bench.gpu.sm_count,
              bench.gpu.shared_bytes_per_block);
  if (mode == "peak") return peak(bench), 0;
  if (mode == "check") return check(bench, words.size() > 1);
  if (mode == "sweep") {
    std::vector<std::pair<int64_t, int64_t>> shapes;
    for (size_t i = 1; i + 1 < words.size(); i += 2) shapes.push_back({number(i), number(i + 1)});
    return sweep(bench, shapes), 0;
  }
  if (mode == "one" && words.size() >= 6) {
    std::vector<WeightView> weights = random_weights(number(4), number(5), 2);
    const Call call = call_of(bench, words[1], static_cast<int>(number(2)), number(3));
    for (int64_t i = 0; i < std::max<int64_t>(1, number(6)); ++i) call(weights[i % 2]);
    require(cudaStreamSynchronize(bench.stream), words[1].c_str());
    return std::printf("ran %s\n", words[1].c_str()), 0;
  }
  std::printf("usage: kernels peak | check [small] | sweep [n k ...] | one KERNEL TILE m n k [times]\n");
  return 2;
}
