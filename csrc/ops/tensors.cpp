// Creates tensors through torch's C shim.
#include "ops/tensors.h"

namespace qlora::ops {
namespace {

int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      STD_TORCH_CHECK(false, "no op makes a tensor of ScalarType ", static_cast<int>(dtype));
  }
}

}  // namespace

Tensor empty_like_device(const Tensor& like, const int64_t* sizes, size_t dims, ScalarType dtype) {
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0; stride *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = stride;
  int32_t device = 0;
  check_shim(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  check_shim(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides.data(), shim_dtype(dtype), device,
                                      like.get_device_index(), &made));
  return Tensor(made);
}

}  // namespace qlora::ops
