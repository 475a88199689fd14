// Element types that kernels meet at run time, on every device.
#pragma once

namespace qlora {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64 };

}  // namespace qlora
