// Checks of the arguments of forward and backward, shared by all devices: contiguous matrices of matching shapes.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops/checks.h"

namespace qlora::ops {

// A contiguous matrix [rows, cols]: tensor, data, element type and extents.
struct Matrix {
  Tensor tensor;
  const void* data;
  DType dtype;
  int64_t rows, cols;
};

// What an op reads of its tokens. A backward op without gradients of low-rank factors needs only their shape and dtype,
// so its caller can pass a tensor without values (qlora.ops.common), which is not made contiguous. The matrix then has
// no data.
enum class Reads { kValues, kShape };
inline Reads values_if(bool needed) { return needed ? Reads::kValues : Reads::kShape; }

// `like` is x; all tensors must be on its device.
Matrix as_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const Tensor& like);

Matrix tokens_matrix(const Tensor& t, const char* name, int64_t features, const char* rule, const Tensor& like,
                     Reads reads = Reads::kValues);

// The gradient of y [..., n]; it must have as many rows as x.
Matrix grad_matrix(const Tensor& grad, int64_t n, const Matrix& tokens);

Matrix lora_matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols, const char* rule, const Tensor& like);

std::optional<Matrix> check_bias(const OptionalTensor& bias, int64_t n, const Tensor& like);

struct Adapter {
  Matrix a, b;  // [r, k], [n, r]
  float scaling;
};

std::optional<Adapter> check_lora(const OptionalTensor& a, const OptionalTensor& b, int64_t n, int64_t k,
                                  double scaling, const Tensor& like);

std::optional<Matrix> check_lora_x(const OptionalTensor& lora_x, const Tensor& x, const std::optional<Adapter>& lora,
                                   Reads reads = Reads::kValues);

// The arguments that every product has: the weight (n, k) and the tokens [m, k].
struct Base {
  CheckedWeight w;
  Matrix tokens;
};

Base check_base(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                const OptionalTensor& nested_offset, const std::vector<int64_t>& shape, const std::string& quant_type,
                int64_t block_size, Reads reads = Reads::kValues);

// Several adapters for one batch. The values of adapter_of_row are checked by the op or kernel of each device.
struct Adapters {
  Matrix a, b;  // [adapters * r, k], [adapters * n, r]
  Tensor scaling, adapter_of_row;
  const float* scale;     // [adapters]; null: one number for all
  const int64_t* of_row;  // [tokens], -1: base only
  int64_t count, r, n;
  size_t element_size;

  // Views of the matrices of one adapter.
  Matrix a_of(int64_t adapter) const { return view(a, adapter, r); }
  Matrix b_of(int64_t adapter) const { return view(b, adapter, n); }

 private:
  Matrix view(const Matrix& all, int64_t adapter, int64_t rows) const {
    const char* data =
        static_cast<const char*>(all.data) + adapter * rows * all.cols * static_cast<int64_t>(element_size);
    return {all.tensor, data, all.dtype, rows, all.cols};
  }
};

Adapters check_adapters(const Tensor& lora_a, const Tensor& lora_b, const Tensor& scaling, const Tensor& adapter_of_row,
                        const Base& base);

// The experts of a mixture for one batch: a stack of weights (n, k), and for each row of the result its expert.
struct Experts {
  CheckedWeight w;                 // of all experts; n and k are those of one
  int64_t count;                   // experts
  Matrix tokens;                   // [tokens, k]
  Tensor of_row;                   // int64 [rows]: the expert of each row; a row with any other number is zero
  int64_t choices;                 // rows per token: row i belongs to token i / choices
  std::optional<Adapter> adapter;  // of each expert: a [count * r, k], b [count * n, r]
  int64_t r;                       // 0: no adapter
  std::optional<Matrix> bias;      // [count, n]

  int64_t rows() const { return of_row.numel(); }
};

Experts check_experts(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_offset, const std::vector<int64_t>& shape,
                      const std::string& quant_type, int64_t block_size, const Tensor& expert_of_row,
                      const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling,
                      const OptionalTensor& bias, Reads reads = Reads::kValues);

// One of several layers with the same tokens.
struct Layer {
  CheckedWeight w;
  std::optional<Adapter> adapter;
  std::optional<Matrix> bias;
};

// The arguments of a call for layers that share their tokens. An empty tensor of one dimension means none.
struct Layers {
  Matrix tokens;  // [m, k]
  std::vector<Layer> all;
};

// The arguments of forward.many and backward.many that describe the layers, as they come.
struct LayerLists {
  const std::vector<Tensor>&packed, &absmax, &nested_absmax, &nested_offset;
  const std::vector<int64_t>& out_features;
  const std::vector<Tensor>&lora_a, &lora_b;
  const std::vector<double>& scaling;

  size_t count() const { return packed.size(); }
};

// What an argument of one layer is: nothing if it is an empty tensor of one dimension.
inline OptionalTensor optional_of(const Tensor& t) {
  return t.dim() == 1 && t.numel() == 0 ? OptionalTensor() : OptionalTensor(t);
}

// Checks that every list has as many entries as there are weights.
void check_lists(const LayerLists& lists, const char* more_name, const std::vector<Tensor>& more);

// Calls check(i) for the layers one after another; an error says which layer it is about.
template <class Check>
void for_each_layer(size_t count, const Check& check) {
  for (size_t i = 0; i < count; ++i) {
    try {
      check(i);
    } catch (const std::exception& error) {
      throw std::runtime_error("layer " + std::to_string(i) + " of " + std::to_string(count) + ": " + error.what());
    }
  }
}

// `bias` may be null.
Layers check_layers(const Tensor& x, const LayerLists& lists, const std::string& quant_type, int64_t block_size,
                    const std::vector<Tensor>* bias, Reads reads = Reads::kValues);

// Arguments of the affine form: integer weights with scale and zero_point, which hold one value, one per output
// channel, or one row per group of input rows.
struct Affine {
  Matrix tokens;
  Tensor quantized, scale, zero_point;
  DType dtype;  // of `quantized`
  AffineGrid grid;
  int64_t in, out, r;
  Matrix b, a;  // [in, r], [r, out]
  float scaling;
};

AffineGrid check_grid(const Tensor& scale, const Tensor& zero_point, int64_t in, int64_t out);

Affine check_affine(const Tensor& x, const Tensor& quantized_w, const Tensor& scale, const Tensor& zero_point,
                    const Tensor& b, const Tensor& a, double alpha, Reads reads = Reads::kValues);

}  // namespace qlora::ops
