// The names of the 4-bit types as text: for messages, and from a user's word to a type.
#pragma once

#include <string>

#include "format/codebook.h"

namespace qlora {

// "nf4, fp4, int4"
inline std::string quant_type_names() {
  std::string names;
  for (const QuantTypeName& entry : kQuantTypes) names += (names.empty() ? "" : ", ") + std::string(entry.name);
  return names;
}

// False if there is no such type.
inline bool parse_quant_type(const std::string& name, QuantType* type) {
  for (const QuantTypeName& entry : kQuantTypes) {
    if (name != entry.name) continue;
    *type = entry.type;
    return true;
  }
  return false;
}

inline std::string unknown_quant_type(const std::string& name) {
  return "quant_type='" + name + "' is unknown: use one of " + quant_type_names();
}

}  // namespace qlora
