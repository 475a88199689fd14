// The names of the 4-bit types as text: for messages, and from a user's word to a type.
#pragma once

#include <string>

#include "format/codebook.h"

namespace qlora {

constexpr QuantType quant_type_at(int i) { return static_cast<QuantType>(i); }

// "nf4, fp4, int4"
inline std::string quant_type_names() {
  std::string names;
  for (int i = 0; i < kQuantTypeCount; ++i)
    names += (names.empty() ? "" : ", ") + std::string(quant_type_name(quant_type_at(i)));
  return names;
}

// False if there is no such type.
inline bool parse_quant_type(const std::string& name, QuantType* type) {
  for (int i = 0; i < kQuantTypeCount; ++i) {
    if (name != quant_type_name(quant_type_at(i))) continue;
    *type = quant_type_at(i);
    return true;
  }
  return false;
}

inline std::string unknown_quant_type(const std::string& name) {
  return "quant_type='" + name + "' is unknown: use one of " + quant_type_names();
}

}  // namespace qlora
