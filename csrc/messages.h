// Formats shapes, types and layouts as Python does, for messages.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <sstream>
#include <string>

namespace fastroute {

// As a Python list: [2, 3].
inline std::string list(at::IntArrayRef values) {
  std::ostringstream text;
  text << values;
  return text.str();
}

// As a Python tuple: (2, 3), (4,).
inline std::string tuple(at::IntArrayRef values) {
  const std::string inside = list(values);
  return "(" + inside.substr(1, inside.size() - 2) + (values.size() == 1 ? ",)" : ")");
}

inline std::string name(at::ScalarType type) { return "torch." + std::string(c10::getDtypeNames(type).first); }

inline std::string name(at::Layout layout) {
  switch (layout) {
    case at::kStrided: return "torch.strided";
    case at::kSparse: return "torch.sparse_coo";
    case at::kSparseCsr: return "torch.sparse_csr";
    case at::kSparseCsc: return "torch.sparse_csc";
    case at::kSparseBsr: return "torch.sparse_bsr";
    case at::kSparseBsc: return "torch.sparse_bsc";
    case at::kMkldnn: return "torch._mkldnn";
    default: return "torch.jagged";
  }
}

// Types as a choice: "torch.float64 or torch.float32".
inline std::string either(at::ScalarType a, at::ScalarType b) {
  return a == b ? name(a) : name(a) + " or " + name(b);
}

}  // namespace fastroute
