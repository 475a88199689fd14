// The Python module qlora._C: what the format and the machine are, without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/dispatch.h"
#include "cpu/select.h"
#include "format/codebook.h"
#include "format/dynamic_map.h"
#include "format/layout.h"

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

std::string active_isa() {
  const char* bad_value = nullptr;
  const qlora::cpu::KernelTable* table = qlora::cpu::active_table(&bad_value);
  if (table == nullptr)
    throw std::invalid_argument(std::string(qlora::cpu::kIsaVariable) + "='" + (bad_value ? bad_value : "") +
                                "' is unknown: use scalar, avx2 or avx512");
  return table->isa;
}

std::vector<float> levels(const std::string& quant_type) {
  for (const qlora::QuantTypeName& entry : qlora::kQuantTypes) {
    if (quant_type == entry.name) {
      const float* table = qlora::codebook(entry.type);
      return {table, table + 16};
    }
  }
  throw std::invalid_argument("quant_type='" + quant_type + "' is unknown: use one of nf4, fp4, int4");
}

py::tuple explain_forward(int64_t m, int64_t k) {
  const auto kernel = qlora::cpu::select_forward(m, k);
  return py::make_tuple(qlora::cpu::kernel_name(kernel), qlora::cpu::why_not_faster(kernel));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Format constants, CPU features and build information; no torch.";
  m.def("runnable_isas", &runnable_isas, "Kernel levels that this machine runs, slowest first.");
  m.def("active_isa", &active_isa, "The level in use: the best one, capped by QLORA_CPU_ISA.");
  m.def("codebook", &levels, py::arg("quant_type"), "The 16 levels of a 4-bit type, by code.");
  m.def(
      "dynamic_map",
      [] { return std::vector<float>(qlora::kDynamicMap.value, qlora::kDynamicMap.value + qlora::kDynamicMapSize); },
      "The 256 values of the signed 8-bit dynamic map, ascending.");
  m.def("explain_forward", &explain_forward, py::arg("m"), py::arg("k"),
        "(kernel, why not a faster one) for m tokens and k input features.");
  std::vector<std::string> quant_types;
  for (const qlora::QuantTypeName& entry : qlora::kQuantTypes) quant_types.emplace_back(entry.name);
  m.attr("QUANT_TYPES") = py::tuple(py::cast(quant_types));
  m.attr("FP4_THRESHOLDS") = py::tuple(py::cast(std::vector<float>(qlora::kFp4Thresholds, qlora::kFp4Thresholds + 7)));
  m.attr("FP4_CODE_OF_RANK") = py::tuple(py::cast(std::vector<int>(qlora::kFp4CodeOfRank, qlora::kFp4CodeOfRank + 8)));
  m.attr("MIN_BLOCK_SIZE") = qlora::kMinBlockSize;
  m.attr("MAX_BLOCK_SIZE") = qlora::kMaxBlockSize;
  m.attr("NESTED_BLOCK") = qlora::kNestedBlock;
  m.attr("DECODE_TOKENS") = qlora::cpu::kDecodeTokens;
  m.attr("COMPILER") = QLORA_COMPILER;
  m.attr("BUILD_TORCH") = QLORA_BUILD_TORCH;
  m.attr("TORCH_TARGET") = QLORA_TORCH_TARGET;
}
