// Element types of kernel arguments, chosen at run time; the same on every device.
#pragma once

namespace qlora {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64 };

// Bytes of a float32, bfloat16 or float16 element.
constexpr int float_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace qlora
