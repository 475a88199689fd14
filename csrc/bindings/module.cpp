// The Python module qlora._C: format constants, CPU features, kernel selection and build information, without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa/dispatch.h"
#include "cpu/isa/features.h"
#include "cpu/select.h"
#include "cuda/select.h"
#include "format/adamw.h"
#include "format/codebook.h"
#include "format/dynamic_map.h"
#include "format/layout.h"
#include "format/quant_type_names.h"
#include "format/scale_search.h"

namespace py = pybind11;

namespace {

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < qlora::cpu::kIsaCount; ++i) {
    const auto isa = static_cast<qlora::cpu::Isa>(i);
    if (qlora::cpu::table_of(isa) != nullptr) names.emplace_back(qlora::cpu::isa_name(isa));
  }
  return names;
}

const qlora::cpu::KernelTable& active_kernels() {
  const char* bad_value = nullptr;
  const qlora::cpu::KernelTable* table = qlora::cpu::active_table(&bad_value);
  if (table == nullptr)
    throw std::invalid_argument(std::string(qlora::cpu::kIsaVariable) + "='" + (bad_value ? bad_value : "") +
                                "' is unknown: use " + qlora::cpu::kIsaChoices);
  return *table;
}

std::string preferred_isa() { return qlora::cpu::isa_name(qlora::cpu::preferred_isa()); }
std::string active_isa() { return active_kernels().isa; }

qlora::QuantType check_quant_type(const std::string& name) {
  qlora::QuantType type{};
  if (!qlora::parse_quant_type(name, &type)) throw std::invalid_argument(qlora::unknown_quant_type(name));
  return type;
}

std::vector<float> levels(const std::string& quant_type) {
  const float* table = qlora::codebook(check_quant_type(quant_type));
  return {table, table + qlora::kLevels};
}

template <class T, size_t kCount>
py::tuple tuple_of(const T (&values)[kCount]) {
  return py::tuple(py::cast(std::vector<T>(values, values + kCount)));
}

qlora::DType token_dtype(const std::string& dtype) {
  return dtype == "bfloat16"  ? qlora::DType::kBFloat16
         : dtype == "float16" ? qlora::DType::kFloat16
                              : qlora::DType::kFloat32;
}

py::dict explain_forward(int64_t m, int64_t k, const std::string& dtype) {
  const qlora::DType type = token_dtype(dtype);
  const qlora::cpu::TileKernels* tiles = active_kernels().tiles_for(type);
  const auto kernel = qlora::cpu::select_forward(m, k, tiles);
  const auto gradients = tiles != nullptr ? qlora::cpu::ForwardKernel::kTiles : qlora::cpu::ForwardKernel::kGemm;
  const bool few =
      kernel == qlora::cpu::ForwardKernel::kGemvWords || kernel == qlora::cpu::ForwardKernel::kGemvElements;
  py::dict chosen;
  chosen["kernel"] = qlora::cpu::kernel_name(kernel);
  chosen["why_not_faster"] = qlora::cpu::why_not_faster(kernel, type);
  chosen["backward"] = qlora::cpu::kernel_name(gradients);
  chosen["gradients"] = qlora::cpu::kernel_name(gradients);
  chosen["low_rank"] = few ? "dot" : qlora::cpu::kernel_name(kernel);
  return chosen;
}

// The decisions of select.h for one product on one GPU, as a dictionary.
py::dict cuda_select(int64_t m, int64_t n, int64_t k, const std::string& dtype, int64_t block_size, int arch,
                     int sm_count, int shared_bytes_per_block, std::optional<bool> has_wgmma, int64_t rank,
                     int64_t experts) {
  using namespace qlora::cuda;
  const qlora::DType type = token_dtype(dtype);
  const Problem problem{m, n, k, type, block_size};
  GpuInfo gpu{arch, sm_count, shared_bytes_per_block};
  gpu.has_wgmma = has_wgmma.value_or(arch == 90);
  const ForwardKernel kernel = select_forward(problem, gpu);
  const char* why_forward = why_general_forward(problem, gpu);
  const char* why_backward = why_general_backward(problem, gpu);
  const GemmTile tile = select_gemm_tile(m, n, gpu);
  const int64_t gemv_m = m < kGemvTokens ? m : kGemvTokens;
  const GemvTile gemv_tile = select_gemv_tile(gemv_m, n, k, gpu);
  const auto tuple = [](int rows, int tokens) { return py::make_tuple(rows, tokens); };
  py::dict chosen;
  chosen["forward"] = kernel_name(kernel);
  chosen["forward_tile"] = kernel == ForwardKernel::kGemv   ? tuple(gemv_tile.rows, kGemvTokens)
                           : kernel == ForwardKernel::kGemm ? tuple(tile_rows(tile), tile_tokens(tile))
                           : kernel == ForwardKernel::kDequantizeMatmul
                               ? tuple(static_cast<int>(select_panel(n, k, type, gpu)), static_cast<int>(m))
                               : tuple(64, 64);
  chosen["why_not_faster"] = why_forward != nullptr ? why_forward : "";
  const BackwardKernel backward = select_backward(problem, gpu);
  chosen["backward"] = kernel_name(backward);
  const GemmTile dx_tile = select_gemm_tile(m, k, gpu);
  chosen["backward_tile"] = backward == BackwardKernel::kGemmDx
                                ? tuple(dx_tile == GemmTile::kTuring ? 128 : tile_rows(dx_tile), tile_tokens(dx_tile))
                            : backward == BackwardKernel::kDequantizeMatmul
                                ? tuple(static_cast<int>(select_panel(k, n, type, gpu)), static_cast<int>(m))
                                : tuple(64, 64);
  chosen["why_not_faster_backward"] = why_backward != nullptr ? why_backward : "";
  const char* why_factors = why_general_factors(problem, gpu);
  chosen["gradients"] = why_factors != nullptr ? "general" : "lora_grad";
  chosen["why_not_faster_gradients"] = why_factors != nullptr ? why_factors : "";
  const char* why_low_rank = why_general_low_rank(problem, gpu);
  chosen["low_rank"] = why_low_rank != nullptr || dots_win(m, rank) ? "token_dot" : "lora_down";
  chosen["why_not_faster_low_rank"] = why_low_rank != nullptr ? why_low_rank : "";
  const GemmTile of_experts = select_experts_tile(m, experts, n, gpu);
  const GemmTile dx_of_experts = select_experts_tile(m, experts, k, gpu);
  chosen["experts_forward"] = why_forward != nullptr          ? kernel_name(ForwardKernel::kGeneral)
                              : experts_take_gemv(m, experts) ? kernel_name(ForwardKernel::kGemv)
                                                              : kernel_name(ForwardKernel::kGemm);
  chosen["experts_tile"] = tuple(tile_rows(of_experts), tile_tokens(of_experts));
  chosen["experts_backward_tile"] =
      tuple(dx_of_experts == GemmTile::kTuring ? 128 : tile_rows(dx_of_experts), tile_tokens(dx_of_experts));
  if (kernel == ForwardKernel::kGemv)
    chosen["shared_bytes"] = gemv_shared_bytes(gemv_tile.rows, gemv_m, gemv_tile.panel_chunks);
  return chosen;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Format constants, CPU features and build information; no torch.";
  m.def("runnable_isas", &runnable_isas, "Kernel levels that this machine runs, slowest first.");
  m.def("preferred_isa", &preferred_isa, "The level that is fastest on this machine.");
  m.def("active_isa", &active_isa, "The level in use: the preferred one, or what QLORA_CPU_ISA names.");
  m.def("codebook", &levels, py::arg("quant_type"), "The 16 levels of a 4-bit type, by code.");
  m.def(
      "dynamic_map",
      [] { return std::vector<float>(qlora::kDynamicMap.value, qlora::kDynamicMap.value + qlora::kDynamicMapSize); },
      "The 256 values of the signed 8-bit dynamic map, ascending.");
  m.def(
      "unsigned_dynamic_map",
      [] {
        const float* map = qlora::kUnsignedDynamicMap.value;
        return std::vector<float>(map, map + qlora::kDynamicMapSize);
      },
      "The 256 values of the unsigned 8-bit dynamic map, ascending.");
  m.def("explain_forward", &explain_forward, py::arg("m"), py::arg("k"), py::arg("dtype"),
        "The kernels for m tokens of a dtype and k in features, and why not a faster one, as a dictionary.");
  m.def(
      "cuda_select", &cuda_select, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("block_size"),
      py::arg("arch"), py::arg("sm_count"), py::arg("shared_bytes_per_block"), py::arg("has_wgmma") = py::none(),
      py::arg("rank") = 16, py::arg("experts") = 1,
      "The kernels and tiles for one product on one GPU, and why not faster ones; needs no GPU. The tiles of a mixture "
      "are for m rows divided among `experts`.");
  m.def(
      "level_multiplier",
      [](const std::string& quant_type, const std::string& dtype) {
        return qlora::level_multiplier(check_quant_type(quant_type), token_dtype(dtype));
      },
      py::arg("quant_type"), py::arg("dtype"), "The factor of the levels that tensor cores take in a 16-bit dtype.");
  std::vector<std::string> quant_types, of_bitsandbytes;
  for (int i = 0; i < qlora::kQuantTypeCount; ++i) {
    const qlora::QuantType type = qlora::quant_type_at(i);
    quant_types.emplace_back(qlora::quant_type_name(type));
    if (qlora::in_bitsandbytes(type)) of_bitsandbytes.emplace_back(qlora::quant_type_name(type));
  }
  m.attr("BITSANDBYTES_QUANT_TYPES") = py::tuple(py::cast(of_bitsandbytes));
  m.attr("QUANT_TYPES") = py::tuple(py::cast(quant_types));
  m.attr("FP4_THRESHOLDS") = tuple_of(qlora::kFp4Thresholds);
  m.attr("FP4_CODE_OF_RANK") = tuple_of(qlora::kFp4CodeOfRank);
  m.attr("SCALE_FACTORS") = tuple_of(qlora::kScaleFactors.value);
  m.attr("MIN_BLOCK_SIZE") = qlora::kMinBlockSize;
  m.attr("MAX_BLOCK_SIZE") = qlora::kMaxBlockSize;
  m.attr("NESTED_BLOCK") = qlora::kNestedBlock;
  m.attr("MOMENT_BLOCK") = qlora::kMomentBlock;
  m.attr("GEMV_TOKENS") = qlora::cpu::kGemvTokens;
  m.attr("EXPERT_ROWS") = qlora::cpu::kExpertRows;
  m.attr("GPU_PANEL_BYTES") = qlora::cuda::GpuInfo{}.panel_bytes;
#ifdef QLORA_CUDA_ARCHS
  m.attr("CUDA_ARCHS") = py::make_tuple(QLORA_CUDA_ARCHS);  // ascending; the build includes PTX of the last one
#else
  m.attr("CUDA_ARCHS") = py::tuple();  // this build has no CUDA operators
#endif
  m.attr("COMPILER") = QLORA_COMPILER;
  m.attr("BUILD_TORCH") = QLORA_BUILD_TORCH;
  m.attr("TORCH_TARGET") = QLORA_TORCH_TARGET;
}
