// Element types of kernel arguments, chosen at run time; the same on every device.
#pragma once

namespace qlora {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64 };

}  // namespace qlora
