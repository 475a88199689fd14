// Choice of the CUDA kernels for a shape and a GPU: pure functions, which can be tested and explained without a GPU.
#pragma once

#include <cstdint>

#include "format/dtype.h"

namespace qlora::cuda {

struct GpuInfo {
  int arch = 0;  // 75, 80, 86, 89, 90, 100, 120
  int sm_count = 0;
  int shared_bytes_per_block = 0;  // the most that a launch may use
  // Size of a dequantized panel of W. Most weights fit into one panel: each further panel reads x again, and its last
  // wave leaves SMs idle (docs/notes/cuda-kernels.md).
  int64_t panel_bytes = int64_t{128} << 20;
  bool has_wgmma = false;  // compute capability 9.0, and the library was built for it
};

// The shape of a product, and everything else that decides its kernel.
struct Problem {
  int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::kFloat32;  // of the tokens
  int64_t block_size = 64;
  bool many_adapters = false;
};

inline constexpr int kGemvTokens = 16;  // tokens of one launch; up to here, reading the weight dominates the cost
// Two launches of the `gemv` kernel are still faster than the kernels with large tiles (docs/notes/cuda-kernels.md).
inline constexpr int kGemvMostTokens = 2 * kGemvTokens;

// Division of work in the `gemv` kernel: rows of W per thread block, and the number of chunks of 64 weights whose
// scales are in shared memory at a time.
struct GemvTile {
  int rows = 0;  // 16, or 32 for more than eight tokens
  int panel_chunks = 0;
};

constexpr int kGemvWarps = 4;
constexpr int kGemvTableBytes = 32 * 1024;
constexpr int kGemvMostPanelChunks = 256;
constexpr int gemv_stages(int64_t m) { return m <= 8 ? 5 : 3; }

// Bytes of the table, a ring of stages for each warp, and scales, for `rows` rows.
constexpr int64_t gemv_shared_bytes(int rows, int64_t m, int64_t panel_chunks) {
  return kGemvTableBytes + kGemvWarps * gemv_stages(m) * (32 * rows + 128 * m) + 4 * rows * (panel_chunks | 1);
}

// Blocks of 16 rows hide latency best, because three or four of them share an SM. Above eight tokens, reading x costs
// most. Blocks of 32 rows read it half as often; they are used if shared memory has room for two per SM and at least
// three of four SMs get one. Both rules come from the timing model (docs/notes/cuda-kernels.md). A panel is as long as
// shared memory allows (at least 28 chunks for 16 rows); if another panel follows, every warp gets the same number of
// chunks.
constexpr bool gemv_takes_32_rows(int64_t m, int64_t n, const GpuInfo& gpu) {
  return m > 8 && gpu.shared_bytes_per_block >= 160 * 1024 && n >= int64_t{24} * gpu.sm_count;
}
constexpr GemvTile select_gemv_tile(int64_t m, int64_t n, int64_t k, const GpuInfo& gpu) {
  const int64_t chunks = k / 64;
  for (int rows = gemv_takes_32_rows(m, n, gpu) ? 32 : 16;; rows /= 2) {
    const int64_t room = (gpu.shared_bytes_per_block - gemv_shared_bytes(rows, m, 0)) / (4 * rows);
    const int64_t longest = room < kGemvMostPanelChunks ? room : kGemvMostPanelChunks;
    const int64_t panel = chunks <= longest ? chunks : longest / kGemvWarps * kGemvWarps;
    // 32 rows are not worth it if panels become short.
    if (panel == chunks || panel >= 16 || rows == 16) return {rows, static_cast<int>(panel)};
  }
}

// The tile of a thread block, rows x tokens; rows are out features in the forward and in features in dx. Several groups
// of warps share the reduction. Small: fits into the 99 KiB of shared memory of sm_86, sm_89 and sm_120. Turing: 64 x
// 64 (128 x 64 in dx) in 64 KiB. Wgmma: uses Hopper's own instructions.
enum class GemmTile { kTuring, k64x32, k64x32Small, k64x64, k128x64, k128x64Wgmma, k128x128Wgmma };

constexpr bool is_wgmma(GemmTile tile) { return tile == GemmTile::k128x64Wgmma || tile == GemmTile::k128x128Wgmma; }
constexpr int tile_rows(GemmTile tile) { return tile == GemmTile::k128x64 || is_wgmma(tile) ? 128 : 64; }
constexpr int tile_tokens(GemmTile tile) {
  if (tile == GemmTile::k64x32 || tile == GemmTile::k64x32Small) return 32;
  return tile == GemmTile::k128x128Wgmma ? 128 : 64;
}
// Tiles of tokens: m in one product, or m divided among experts. How many each expert gets is only known on the device,
// so half a tile is added for each expert; an expert without tokens has no tile.
struct TokensOfTiles {
  int64_t m = 0, experts = 1;
  constexpr int64_t tiles(int tokens) const {
    if (experts == 1) return (m + tokens - 1) / tokens;
    const int64_t active = experts < m ? experts : m, expected = (m + active * tokens / 2) / tokens;
    return expected < active ? active : expected;
  }
};
constexpr int64_t gemm_waves(GemmTile tile, const TokensOfTiles& of, int64_t rows, const GpuInfo& gpu) {
  const int64_t blocks = of.tiles(tile_tokens(tile)) * ((rows + tile_rows(tile) - 1) / tile_rows(tile));
  return (blocks + gpu.sm_count - 1) / gpu.sm_count;
}

// The tile with the shortest predicted time: the number of waves, with one block per SM at a time, times the predicted
// relative cost of a block (docs/notes/cuda-kernels.md).
constexpr GemmTile best_gemm_tile(const TokensOfTiles& of, int64_t rows, bool wgmma, const GpuInfo& gpu) {
  if (gpu.shared_bytes_per_block < 96 * 1024) return GemmTile::kTuring;
  struct Candidate {
    GemmTile tile;
    int64_t cost;
  };
  const bool small = gpu.shared_bytes_per_block < 160 * 1024;
  const Candidate with_mma[] = {{small ? GemmTile::k64x32Small : GemmTile::k64x32, small ? 9 : 10},
                                {small ? GemmTile::k128x64 : GemmTile::k64x64, small ? 28 : 14},
                                {GemmTile::k128x64, small ? 28 : 26}};
  const Candidate with_wgmma[] = {{GemmTile::k128x64Wgmma, 11}, {GemmTile::k128x128Wgmma, 18}};
  Candidate best = with_mma[0];
  const auto compare = [&](const Candidate& other) {
    if (other.cost * gemm_waves(other.tile, of, rows, gpu) < best.cost * gemm_waves(best.tile, of, rows, gpu))
      best = other;
  };
  for (const Candidate& other : with_mma) compare(other);
  if (wgmma)
    for (const Candidate& other : with_wgmma) compare(other);
  return best.tile;
}
constexpr GemmTile select_gemm_tile(int64_t m, int64_t rows, const GpuInfo& gpu) {
  return best_gemm_tile({m}, rows, gpu.has_wgmma, gpu);
}
// Rows of experts in a thread block of the `gemv` kernel, and how many blocks share the rows of a weight. A block
// builds its table once, so it takes several groups of 16 rows of W, as long as four blocks for each place on an SM
// remain; three share an SM.
inline constexpr int kGemvExpertsPiece = 8;
constexpr int64_t select_gemv_row_blocks(int64_t m, int64_t experts, int64_t n, const GpuInfo& gpu) {
  const int64_t groups = (n + 15) / 16, pieces = TokensOfTiles{m, experts}.tiles(kGemvExpertsPiece);
  const int64_t wanted = (12 * gpu.sm_count + pieces - 1) / pieces, each = (groups + wanted - 1) / wanted;
  return (groups + each - 1) / each;  // all blocks but the last take equally many groups
}
// Whether experts have so few rows that the `gemv` kernel is faster although it reads a weight once for eight rows: at
// 4, 8 and 16 rows for an expert it is predicted to take 0.5, 0.85 and 1.25 times as long as `gemm`
// (docs/notes/cuda-kernels.md).
constexpr bool experts_take_gemv(int64_t m, int64_t experts) { return m <= kGemvExpertsPiece * experts; }

// The same for m rows of the result that are divided among experts; wgmma has no kernel for experts yet.
constexpr GemmTile select_experts_tile(int64_t m, int64_t experts, int64_t rows, const GpuInfo& gpu) {
  return best_gemm_tile({m, experts}, rows, false, gpu);
}

// Tokens per thread block in the low-rank down projection: 16 if such blocks occupy at most half of the SMs, else 32,
// because each block reads the factor of its ranks again.
constexpr int select_lora_down_tokens(int64_t m, int64_t r, const GpuInfo& gpu) {
  return (m + 15) / 16 * ((r + 15) / 16) * 2 <= gpu.sm_count ? 16 : 32;
}

// Whether dot products on the CUDA cores are faster for the down projection, which is the case for few tokens.
constexpr bool dots_win(int64_t m, int64_t rank) { return m <= kGemvMostTokens && m * rank <= 1024; }

// Features per thread block in the gradients of the low-rank factors.
constexpr int lora_grad_features(int ranks_per_block) { return ranks_per_block == 64 ? 128 : 256; }

// Bytes of three stages of 64 tokens of x and two stages of their activations.
constexpr int lora_grad_shared_bytes(int ranks_per_block, bool splits) {
  return 3 * 64 * 128 + 2 * (splits ? 2 : 1) * ranks_per_block * 128;
}

constexpr int select_lora_grad_ranks(int64_t ranks) { return ranks <= 16 ? 16 : ranks <= 32 ? 32 : 64; }

// Number of parts into which the tokens are divided: enough for two blocks per SM, with at least 64 tokens each.
constexpr int select_lora_grad_parts(int64_t m, int64_t features, int64_t ranks, int64_t adapters, const GpuInfo& gpu) {
  const int ranks_per_block = select_lora_grad_ranks(ranks), wide = lora_grad_features(ranks_per_block);
  const int64_t tiles = (features + wide - 1) / wide * ((ranks + ranks_per_block - 1) / ranks_per_block) * adapters;
  const int64_t wanted = tiles > 0 ? (2 * gpu.sm_count + tiles - 1) / tiles : 1, possible = m / 64;
  const int64_t parts = wanted < possible ? wanted : possible;
  return static_cast<int>(parts < 1 ? 1 : parts > 64 ? 64 : parts);
}

// The number of tokens from which the vendor's GEMM on dequantized panels is faster than the fused kernels, for forward
// and dx.
struct DequantizeMatmulTokens {
  int64_t forward, backward;
};
constexpr DequantizeMatmulTokens dequantize_matmul_tokens(const Problem& p, const GpuInfo& gpu) {
  // The fused kernels multiply float32 tokens on the CUDA cores, so panels pay off as soon as weights are reused.
  if (p.dtype == DType::kFloat32) return {kGemvTokens + 1, kGemvTokens + 1};
  // sm_75: the fused kernels use the same tensor-core instructions as the vendor's GEMM.
  if (gpu.arch < 80) return {INT64_MAX, INT64_MAX};
  // Times of the fused kernels are predicted. Times of panels are measured on an H200 (docs/notes/gpu-runs.md); other
  // GPUs use bitsandbytes' thresholds between the two ways.
  if (gpu.has_wgmma) return {513, 513};
  if (gpu.arch < 86 || (gpu.arch >= 90 && gpu.arch < 120)) return {65, 65};
  return {256, 256};
}

// Rows of W (columns in the backward) per dequantized panel: all of them, or equal panels with a multiple of 64.
// `across` is the other extent of the panel.
constexpr int64_t select_panel(int64_t extent, int64_t across, DType dtype, const GpuInfo& gpu) {
  const int64_t room = gpu.panel_bytes / (across * float_bytes(dtype));
  if (extent <= room) return extent;
  const int64_t most = room < 64 ? 64 : room / 64 * 64, panels = (extent + most - 1) / most;
  return ((extent + panels - 1) / panels + 63) / 64 * 64;
}

enum class ForwardKernel { kGemv, kGemm, kDequantizeMatmul, kGeneral };
enum class BackwardKernel { kGemmDx, kDequantizeMatmul, kGeneral };

constexpr const char* why_no_tensor_cores(DType dtype, const GpuInfo& gpu) {
  if (dtype == DType::kFloat32) return "float32 tokens: their products run on the CUDA cores";
  if (dtype == DType::kBFloat16 && gpu.arch < 80) return "this GPU has no bfloat16 tensor cores: use float16";
  return nullptr;
}

// Why the tensor-core kernels cannot compute a forward product; null if they can.
constexpr const char* why_general_forward(const Problem& p, const GpuInfo& gpu) {
  if (p.n == 0 || p.k == 0) return "the weight is empty";
  if (const char* why = why_no_tensor_cores(p.dtype, gpu)) return why;
  if (p.k % 64 != 0) return "in_features is not a multiple of 64, so the scale changes inside a tensor-core step";
  if (p.block_size < 64) return "block_size 32: the scale changes inside a tensor-core step";
  return nullptr;
}

// The same for dx = dy W.
constexpr const char* why_general_backward(const Problem& p, const GpuInfo& gpu) {
  if (p.n == 0 || p.k == 0) return "the weight is empty";
  if (const char* why = why_no_tensor_cores(p.dtype, gpu)) return why;
  if (p.k % 32 != 0) return "in_features is not a multiple of 32: packed rows are not aligned to 16 bytes";
  if (p.n % 8 != 0) return "out_features is not a multiple of 8: rows of the gradient are not aligned to 16 bytes";
  return nullptr;
}

// The same for the low-rank down projection; k is its reduction.
constexpr const char* why_general_low_rank(const Problem& p, const GpuInfo& gpu) {
  if (p.k == 0) return "there is nothing to sum";
  if (const char* why = why_no_tensor_cores(p.dtype, gpu)) return why;
  if (p.k % 8 != 0) return "the rows are not aligned to 16 bytes";
  return nullptr;
}

// The same for the gradients of lora_a and lora_b, which read rows of x and of dy.
constexpr const char* why_general_factors(const Problem& p, const GpuInfo& gpu) {
  if (p.n == 0 || p.k == 0) return "the weight is empty";
  if (const char* why = why_no_tensor_cores(p.dtype, gpu)) return why;
  if (p.k % 8 != 0) return "in_features is not a multiple of 8: rows of x are not aligned to 16 bytes";
  if (p.n % 8 != 0) return "out_features is not a multiple of 8: rows of the gradient are not aligned to 16 bytes";
  return nullptr;
}

// Whether dequantized panels are faster. `extent` is the extent that panels divide; a small one is not worth the
// launches. For many adapters in float32, no kernel computes the low-rank term alone.
constexpr bool dequantize_matmul_wins(const Problem& p, int64_t extent, int64_t tokens) {
  if (p.many_adapters && p.dtype == DType::kFloat32) return false;
  return p.n > 0 && p.k > 0 && p.m >= tokens && extent >= 512;
}

constexpr ForwardKernel select_forward(const Problem& p, const GpuInfo& gpu) {
  const bool general = why_general_forward(p, gpu) != nullptr;
  if (general && p.dtype != DType::kFloat32) return ForwardKernel::kGeneral;
  if (dequantize_matmul_wins(p, p.n, dequantize_matmul_tokens(p, gpu).forward)) return ForwardKernel::kDequantizeMatmul;
  if (general) return ForwardKernel::kGeneral;
  return p.m <= kGemvMostTokens ? ForwardKernel::kGemv : ForwardKernel::kGemm;
}

constexpr BackwardKernel select_backward(const Problem& p, const GpuInfo& gpu) {
  const bool general = why_general_backward(p, gpu) != nullptr;
  if (general && p.dtype != DType::kFloat32) return BackwardKernel::kGeneral;
  if (p.k % 32 == 0 && dequantize_matmul_wins(p, p.k, dequantize_matmul_tokens(p, gpu).backward))
    return BackwardKernel::kDequantizeMatmul;
  return general ? BackwardKernel::kGeneral : BackwardKernel::kGemmDx;
}

constexpr const char* kDequantizeMatmulName = "dequantize_matmul";
constexpr const char* kernel_name(ForwardKernel kernel) {
  return kernel == ForwardKernel::kGemv               ? "gemv"
         : kernel == ForwardKernel::kGemm             ? "gemm"
         : kernel == ForwardKernel::kDequantizeMatmul ? kDequantizeMatmulName
                                                      : "general";
}
constexpr const char* kernel_name(BackwardKernel kernel) {
  return kernel == BackwardKernel::kGemmDx             ? "gemm_dx"
         : kernel == BackwardKernel::kDequantizeMatmul ? kDequantizeMatmulName
                                                       : "general";
}

}  // namespace qlora::cuda
