// Schemas of all operators of torch.ops.qlora. Implementations are registered per device.
#include <torch/csrc/stable/library.h>

// m tokens, n out features, k in features, r rank; the format is described in docs/concepts/format.md.
//
// nested_absmax and nested_offset: double quantization; None and an empty tensor mean the same.
// search_scales: the scales with the least squared error, weighted by importance [k] for the columns of weight [n, k]
// quantize_with_feedback: packed codes for given scales; feedback [k, k] holds below its diagonal the factors by which
//           the errors of earlier steps change a column, order int64 [k] the column of each step
// quantization_error: float64 [3]: sum of squared differences, sum of squares of the weight, largest difference
// forward:  y [..., n] = x Wᵀ + bias + scaling * (lora_x or x) lora_aᵀ lora_bᵀ        lora_a [r, k], lora_b [n, r]
// backward: (d_x, d_lora_a, d_lora_b, d_lora_x, d_bias); gradients not requested are empty tensors. d_bias is float32.
// multi:    the same with adapter adapter_of_row[row] for each row of x (int64, -1: base only):
//           lora_a [adapters, r, k], lora_b [adapters, n, r], scaling float32 [adapters]
// experts:  y [rows, n] for a stack of weights, shape (experts, n, k): row i is the product of token i / choices of x
//           [..., k] with expert expert_of_row[i] (int64 [tokens * choices]; any number outside 0 … experts - 1:
//           zeros); lora_a [experts, r, k], lora_b [experts, n, r], bias [experts, n]; d_bias is float32
// many:     the same for several layers with the same x, each with its own weight, adapter and bias; an empty tensor of
//           one dimension means none, also in grad, for a result that nobody used
// adamw:    one step in place with decoupled weight decay and float32 moments; step counts from 1
// adamw_8bit: the same with 8-bit moments in blocks of 256 with one absmax each: the first moment holds codes of the
//           signed dynamic map, the second of the unsigned one
// adamw.many, adamw_8bit.many: the same for many parameters; on a GPU, one launch per sixteen parameters
// affine:   y [..., out] = x (q * scale + zero_point) + alpha / r * x B A       q [in, out], B [in, r], A [r, out]
STABLE_TORCH_LIBRARY(qlora, m) {
  m.def(
      "quantize(Tensor weight, str quant_type=\"nf4\", int block_size=64, bool double_quant=True,"
      " bool check_finite=True)"
      " -> (Tensor packed, Tensor absmax, Tensor nested_absmax, Tensor nested_offset)");
  m.def(
      "search_scales(Tensor weight, Tensor importance, str quant_type=\"nf4\", int block_size=64,"
      " bool double_quant=True) -> (Tensor absmax, Tensor nested_absmax, Tensor nested_offset)");
  m.def(
      "quantize_with_feedback(Tensor weight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " str quant_type, int block_size, Tensor? feedback=None, Tensor? order=None) -> Tensor");
  m.def(
      "dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " int[] shape, str quant_type, int block_size, ScalarType dtype) -> Tensor");
  m.def(
      "quantization_error(Tensor weight, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " str quant_type, int block_size) -> Tensor");
  m.def(
      "forward(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " int[] shape, str quant_type, int block_size,"
      " Tensor? lora_a=None, Tensor? lora_b=None, float scaling=1.0, Tensor? bias=None, Tensor? lora_x=None) -> "
      "Tensor");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " int[] shape, str quant_type, int block_size,"
      " Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? lora_x,"
      " bool needs_x, bool needs_lora, bool needs_lora_x, bool needs_bias)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "forward.multi(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " int[] shape, str quant_type, int block_size,"
      " Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor adapter_of_row, Tensor? bias=None) -> Tensor");
  m.def(
      "backward.multi(Tensor grad, Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? "
      "nested_offset,"
      " int[] shape, str quant_type, int block_size,"
      " Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor adapter_of_row,"
      " bool needs_x, bool needs_lora, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "forward.many(Tensor x, Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] nested_offset,"
      " int[] out_features, str quant_type, int block_size,"
      " Tensor[] lora_a, Tensor[] lora_b, float[] scaling, Tensor[] bias) -> Tensor[]");
  m.def(
      "backward.many(Tensor[] grad, Tensor x, Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax,"
      " Tensor[] nested_offset, int[] out_features, str quant_type, int block_size,"
      " Tensor[] lora_a, Tensor[] lora_b, float[] scaling,"
      " bool needs_x, bool needs_lora, bool needs_bias)"
      " -> (Tensor, Tensor[] d_lora_a, Tensor[] d_lora_b, Tensor[] d_bias)");
  m.def(
      "forward.experts(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
      " int[] shape, str quant_type, int block_size, Tensor expert_of_row,"
      " Tensor? lora_a=None, Tensor? lora_b=None, float scaling=1.0, Tensor? bias=None) -> Tensor");
  m.def(
      "backward.experts(Tensor grad, Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? "
      "nested_offset,"
      " int[] shape, str quant_type, int block_size, Tensor expert_of_row,"
      " Tensor? lora_a, Tensor? lora_b, float scaling,"
      " bool needs_x, bool needs_lora, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "forward.affine(Tensor x, Tensor quantized_W, float scale, float zero_point, Tensor B, Tensor A, float alpha)"
      " -> Tensor");
  m.def(
      "forward.affine_grid(Tensor x, Tensor quantized_W, Tensor scale, Tensor zero_point, Tensor B, Tensor A,"
      " float alpha) -> Tensor");
  m.def(
      "backward.affine_grid(Tensor grad, Tensor x, Tensor quantized_W, Tensor scale, Tensor zero_point, Tensor B,"
      " Tensor A, float alpha, bool needs_x, bool needs_lora) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adamw(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()");
  m.def(
      "adamw_8bit(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_absmax, Tensor(d!) exp_avg_sq,"
      " Tensor(e!) exp_avg_sq_absmax,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()");
  m.def(
      "adamw.many(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, int[] steps) -> ()");
  m.def(
      "adamw_8bit.many(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_absmaxs,"
      " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] exp_avg_sq_absmaxs,"
      " float lr, float beta1, float beta2, float eps, float weight_decay, int[] steps) -> ()");
}
