// Double quantization of the scales: absmax - mean, quantized blockwise (256) to the signed 8-bit dynamic map.
#pragma once

#include <cstdint>

namespace qlora::cpu {

// Mean of [count] values: summed in double in flat order, so the thread count cannot change it. 0 for none.
float mean(const float* values, int64_t count);

// Unit: nested block of 256. codes [blocks], nested_absmax [ceil(blocks / 256)].
void double_quantize(const float* absmax, int64_t blocks, float offset, uint8_t* codes, float* nested_absmax,
                     int64_t begin, int64_t end);

}  // namespace qlora::cpu
