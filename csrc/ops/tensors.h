// Creates tensors and views without the dispatcher, which takes 3 to 5 µs per call; an operator makes a dozen calls.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

namespace qlora::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shim(AOTITorchError error) {
  STD_TORCH_CHECK(error == 0, "torch could not make a tensor: its message stands above");
}

// Like torch::stable::contiguous, but does not call the dispatcher if the tensor is contiguous.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// An uninitialised contiguous tensor on the device of `like`.
Tensor empty_like_device(const Tensor& like, const int64_t* sizes, size_t dims, ScalarType dtype);
inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_like_device(like, sizes.begin(), sizes.size(), dtype);
}
inline Tensor empty_of_shape(const Tensor& like) {
  return empty_like_device(like, like.sizes().data(), like.sizes().size(), like.scalar_type());
}
inline Tensor empty_with_last_dim(const Tensor& like, int64_t last, ScalarType dtype) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return empty_like_device(like, sizes.data(), sizes.size(), dtype);
}

// A view of t that begins at element `first`, with other sizes and strides.
inline Tensor view_of(const Tensor& t, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                      int64_t first) {
  AtenTensorHandle made = nullptr;
  check_shim(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(),
                                            first, &made));
  return Tensor(made);
}
inline Tensor matrix_view(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                          int64_t first = 0) {
  return view_of(t, {rows, cols}, {row_stride, col_stride}, first);
}
inline Tensor vector_view(const Tensor& t, int64_t count, int64_t first) { return view_of(t, {count}, {1}, first); }

}  // namespace qlora::ops
