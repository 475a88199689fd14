// Argument checks shared by all ops. Each error names the value and the rule.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "format/codebook.h"
#include "format/dtype.h"
#include "format/layout.h"
#include "format/quant_type_names.h"
#include "ops/tensors.h"

namespace qlora::ops {

using OptionalTensor = std::optional<Tensor>;

std::string text_of(torch::headeronly::IntHeaderOnlyArrayRef sizes);

// The multi-dimensional index of a flat position in a tensor of these sizes, as text.
std::string position_text(int64_t flat, torch::headeronly::IntHeaderOnlyArrayRef sizes);

// None and an empty tensor mean the same.
inline bool is_given(const OptionalTensor& t) { return t.has_value() && t->numel() > 0; }

inline void check_same_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
                  " is on another device than ", like_name, ": all tensors of one call must be on one device");
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name, const char* rule) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype: ", rule);
}

DType float_dtype(ScalarType dtype, const char* name);

DType integer_dtype(ScalarType dtype, const char* name);

QuantType check_quant_type(const std::string& name);

inline void check_block_size(int64_t block_size) {
  STD_TORCH_CHECK(is_block_size(block_size), "block_size=", block_size, " must be a power of two from ", kMinBlockSize,
                  " to ", kMaxBlockSize);
}

int64_t checked_numel(const std::vector<int64_t>& shape);

// A packed weight, or a stack of equal ones, with checked, contiguous tensors.
struct CheckedWeight {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_offset;  // both given or neither
  QuantType type;
  int64_t n, k;
  int block_shift;
};

// `count`: the number of stacked weights (n, k).
CheckedWeight check_weight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                           const OptionalTensor& nested_offset, int64_t n, int64_t k, const std::string& quant_type,
                           int64_t block_size, int64_t count = 1);

// Checks that an order on the CPU names each column once; kernels would write out of bounds otherwise.
void check_permutation(const Tensor& order);

// The message for nan or inf at a flat position.
std::string not_finite_text(const char* name, int64_t position, const Tensor& t);

// Checks the arguments of search_scales, except the values.
void check_search_scales(const Tensor& weight, const Tensor& importance, int64_t block_size);

// Checks that each value of a contiguous tensor on the CPU is finite and at least 0.
void check_importance(const Tensor& importance);

// Checks feedback and order of quantize_with_feedback, except their values.
void check_feedback(const Tensor& weight, const OptionalTensor& feedback, const OptionalTensor& order);

// The weight, or the first one of a stack, as kernels read it; valid while `w` lives.
WeightView view_of(const CheckedWeight& w);

}  // namespace qlora::ops
