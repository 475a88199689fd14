// Double quantization of the scales: absmax - mean, quantized in blocks of 256 to the signed 8-bit dynamic map.
#pragma once

#include <cstdint>

namespace qlora::cpu {

// Mean of `count` values, or 0 if there are none. Sums in double and in order, so the thread count cannot change it.
float mean(const float* values, int64_t count);

// Quantizes nested blocks [begin, end) of 256 scales. Writes codes [blocks] and nested_absmax [ceil(blocks / 256)].
void double_quantize(const float* absmax, int64_t blocks, float offset, uint8_t* codes, float* nested_absmax,
                     int64_t begin, int64_t end);

}  // namespace qlora::cpu
