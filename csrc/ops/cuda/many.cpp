// The ops forward.many and its backward for CUDA: layers that share their tokens, one after another.
#include "ops/cuda/ops.h"
#include "ops/cuda/products.h"

namespace qlora::ops_cuda {

std::vector<Tensor> forward_many(Tensor x, std::vector<Tensor> packed, std::vector<Tensor> absmax,
                                 std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_offset,
                                 std::vector<int64_t> out_features, std::string quant_type, int64_t block_size,
                                 std::vector<Tensor> lora_a, std::vector<Tensor> lora_b, std::vector<double> scaling,
                                 std::vector<Tensor> bias) {
  const LayerLists lists{packed, absmax, nested_absmax, nested_offset, out_features, lora_a, lora_b, scaling};
  check_lists(lists, "bias", bias);
  STD_TORCH_CHECK(x.dim() >= 1, "x has no dimensions: its last one must be in_features");
  const int64_t k = x.size(x.dim() - 1);
  std::vector<Tensor> y;
  for_each_layer(lists.count(), [&](size_t i) {
    y.push_back(forward(x, packed[i], absmax[i], nested_absmax[i], nested_offset[i], {out_features[i], k}, quant_type,
                        block_size, optional_of(lora_a[i]), optional_of(lora_b[i]), scaling[i], optional_of(bias[i]),
                        std::nullopt));
  });
  return y;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> backward_many(
    std::vector<Tensor> grad, Tensor x, std::vector<Tensor> packed, std::vector<Tensor> absmax,
    std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_offset, std::vector<int64_t> out_features,
    std::string quant_type, int64_t block_size, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
    std::vector<double> scaling, bool needs_x, bool needs_lora, bool needs_bias) {
  const LayerLists lists{packed, absmax, nested_absmax, nested_offset, out_features, lora_a, lora_b, scaling};
  check_lists(lists, "grad", grad);
  STD_TORCH_CHECK(x.dim() >= 1, "x has no dimensions: its last one must be in_features");
  const int64_t k = x.size(x.dim() - 1);
  OptionalTensor d_x;  // the sum, rounded to the dtype of x after each layer, as autograd adds gradients
  std::vector<Tensor> d_lora_a, d_lora_b, d_bias;
  for_each_layer(lists.count(), [&](size_t i) {
    Tensor of_x, of_a = nothing(x), of_b = nothing(x), of_lora_x, of_bias = nothing(x);
    if (optional_of(grad[i])) {
      std::tie(of_x, of_a, of_b, of_lora_x, of_bias) =
          backward(grad[i], x, packed[i], absmax[i], nested_absmax[i], nested_offset[i], {out_features[i], k},
                   quant_type, block_size, optional_of(lora_a[i]), optional_of(lora_b[i]), scaling[i], std::nullopt,
                   needs_x, needs_lora, false, needs_bias);
      if (needs_x) d_x = d_x ? torch::stable::subtract(*d_x, of_x, -1.0) : of_x;
    }
    d_lora_a.push_back(of_a);
    d_lora_b.push_back(of_b);
    d_bias.push_back(of_bias);
  });
  if (!d_x) d_x = needs_x ? torch::stable::new_zeros(x, x.sizes()) : nothing(x);
  return {*d_x, d_lora_a, d_lora_b, d_bias};
}

}  // namespace qlora::ops_cuda
