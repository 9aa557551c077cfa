// Lists of parallel paths (N, C, *S): checks shared by all operators, sample layout, and allocation of outputs.
// fastroute/ops/_paths.py does the same in Python, without the compiled library.

#pragma once

#include "common.h"
#include "messages.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastroute {

using OptionalTensor = std::optional<at::Tensor>;

// Strides, paddings and dilations up to this do not overflow when multiplied by a size.
constexpr int64_t kMaxSize = int64_t{1} << 30;

using Forward = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline bool sample_is_dense(const at::Tensor& x, bool channels_last) {
  int64_t expected = 1;
  const auto matches = [&](int64_t dim) {
    if (x.size(dim) == 1) return true;
    const bool same = x.stride(dim) == expected;
    expected *= x.size(dim);
    return same;
  };
  if (channels_last && !matches(1)) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (!matches(dim)) return false;
  }
  return channels_last || matches(1);
}

// N samples of C channels and S pixels; each sample is dense as [C, S] or [S, C].
struct Geometry {
  int64_t batch, channels, size;
  bool channels_last;

  explicit Geometry(const at::Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), size(1), channels_last(!sample_is_dense(x, false)) {
    for (int64_t dim = 2; dim < x.dim(); ++dim) size *= x.size(dim);
  }
  int64_t elements() const { return channels * size; }
};

inline bool is_served(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble;
}

constexpr const char* kServedTypes = "float32, bfloat16, float16, float64";

// Raises unless xs are 1 to 8 floating-point tensors (N, C, *S) of one shape, type and device.
inline void check_paths(const char* label, at::TensorList xs) {
  TORCH_CHECK_VALUE(
      !xs.empty() && static_cast<int64_t>(xs.size()) <= kMaxPaths, label, " has ", xs.size(),
      " paths; it must have 1 to ", kMaxPaths);
  for (size_t i = 0; i < xs.size(); ++i) {
    TORCH_CHECK_TYPE(xs[i].defined(), label, "[", i, "] is None; every path must be a tensor (N, C, *S)");
  }
  const at::Tensor& first = xs[0];
  const auto shape = first.sizes();
  const auto type = first.scalar_type();
  TORCH_CHECK_TYPE(
      is_served(type), label, "[0] has dtype ", name(type), "; it must be one of ", kServedTypes);
  TORCH_CHECK_VALUE(
      shape.size() >= 2 && shape.size() <= 5, label, "[0] has shape ", tuple(shape),
      "; it must be (N, C) with up to 3 spatial sizes more");
  TORCH_CHECK_VALUE(
      std::find(shape.begin() + 1, shape.end(), 0) == shape.end(), label, "[0] has shape ", tuple(shape),
      "; only the batch size may be 0");
  for (size_t i = 0; i < xs.size(); ++i) {
    const at::Tensor& x = xs[i];
    TORCH_CHECK_VALUE(
        x.layout() == at::kStrided, label, "[", i, "] has layout ", name(x.layout()), "; it must be torch.strided");
    TORCH_CHECK_VALUE(
        x.sizes() == shape, label, "[", i, "] has shape ", tuple(x.sizes()), "; it must have the shape of ", label,
        "[0], ", tuple(shape));
    TORCH_CHECK_TYPE(
        x.scalar_type() == type, label, "[", i, "] has dtype ", name(x.scalar_type()), "; it must have the dtype of ",
        label, "[0], ", name(type));
    TORCH_CHECK_VALUE(
        x.device() == first.device(), label, "[", i, "] is on ", x.device().str(), "; it must be on the device of ",
        label, "[0], ", first.device().str());
  }
}

// Raises unless the tensor is defined: Python's None arrives as an undefined tensor.
inline void check_given(const char* label, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), label, " is None; it must be a tensor");
}

// Raises unless a parameter has this shape, x's device, and x's type or float32.
inline void check_weight(const char* label, const at::Tensor& weight, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      weight.sizes() == shape, label, " has shape ", tuple(weight.sizes()), "; it must have shape ", tuple(shape));
  TORCH_CHECK_VALUE(
      weight.device() == x.device(), label, " is on ", weight.device().str(),
      "; it must be on the device of the paths, ", x.device().str());
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == x.scalar_type(), label, " has dtype ", name(type), "; it must be ",
      either(x.scalar_type(), at::kFloat), " for paths of ", name(x.scalar_type()));
}

// Raises unless these are gate parameters for the paths, as `cross_connect` takes them.
inline void check_gate(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2) {
  const at::Tensor& x = xs[0];
  const int64_t m = static_cast<int64_t>(xs.size()), channels = x.size(1);
  check_given("w2", w2);
  TORCH_CHECK_VALUE(
      w2.dim() == 3 && w2.size(1) >= 1 && w2.size(1) <= kMaxPaths, "w2 has shape ", tuple(w2.sizes()),
      "; it must be (m, n, G), from m = ", m, " paths to n = 1 to ", kMaxPaths);
  const int64_t n = w2.size(1);
  int64_t hidden = channels;
  if (!w1) {
    TORCH_CHECK_VALUE(!b1, "b1 is given without w1; the linear gate (w1=None) has the bias b2 alone");
  } else {
    TORCH_CHECK_VALUE(
        w1->dim() == 3 && w1->size(1) != 0, "w1 has shape ", tuple(w1->sizes()), "; it must be (m, G, C) = (", m,
        ", G, ", channels, ")");
    hidden = w1->size(1);
    check_weight("w1", *w1, {m, hidden, channels}, x);
    if (b1) check_weight("b1", *b1, {m, hidden}, x);
  }
  check_weight("w2", w2, {m, n, hidden}, x);
  if (b2) check_weight("b2", *b2, {m, n}, x);
}

// Raises unless gates are (m, n) or (N, m, n) for the paths.
inline void check_gates(const at::Tensor& gates, at::TensorList xs) {
  check_given("gates", gates);
  const at::Tensor& x = xs[0];
  const int64_t m = static_cast<int64_t>(xs.size()), n = gates.dim() ? gates.size(-1) : 0;
  TORCH_CHECK_VALUE(
      (gates.dim() == 2 || gates.dim() == 3) && n >= 1 && n <= kMaxPaths, "gates have shape ", tuple(gates.sizes()),
      "; they must be (N, m, n) = (", x.size(0), ", ", m, ", n) or (m, n) with n from 1 to ", kMaxPaths);
  if (gates.dim() == 2) {
    check_weight("gates", gates, {m, n}, x);
  } else {
    check_weight("gates", gates, {x.size(0), m, n}, x);
  }
}

// Returns the first of 1 to 8 paths (N, C, *S), whose shapes may differ.
inline const at::Tensor& first_path(at::TensorList xs) {
  TORCH_CHECK(!xs.empty() && static_cast<int64_t>(xs.size()) <= kMaxPaths, "1 to 8 paths are served, not ", xs.size());
  TORCH_CHECK(xs[0].defined() && xs[0].dim() >= 2, "paths must be tensors (N, C, *S)");
  return xs[0];
}

// Checks, for memory safety, paths that are already in the layout of the kernels.
inline void check_aligned(at::TensorList xs, const at::Tensor& like) {
  first_path(xs);
  const bool channels_last = !sample_is_dense(like, false);
  for (const auto& x : xs) {
    TORCH_CHECK(
        x.defined() && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() &&
            x.device() == like.device() && (x.size(0) == 0 || sample_is_dense(x, channels_last)),
        "paths differ in shape, type, device or memory format");
  }
}

// Returns the first of such paths.
inline const at::Tensor& aligned_path(at::TensorList xs) {
  const at::Tensor& x = first_path(xs);
  check_aligned(xs, x);
  return x;
}

// Raises unless these are arguments of `torch.nn.functional.conv2d`, one number per spatial size.
inline void check_geometry(
    int64_t spatial, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto check = [&](const char* label, at::IntArrayRef numbers, int64_t least) {
    TORCH_CHECK_VALUE(
        static_cast<int64_t>(numbers.size()) == spatial, label, " is ", list(numbers), "; it must be one number, or one "
        "for each of ", spatial, " spatial sizes");
    TORCH_CHECK_VALUE(
        std::all_of(numbers.begin(), numbers.end(), [&](int64_t n) { return n >= least && n <= kMaxSize; }), label,
        " is ", list(numbers), "; it must be at least ", least, " and at most ", kMaxSize);
  };
  check("stride", stride, 1);
  check("padding", padding, 0);
  check("dilation", dilation, 1);
}

inline at::Tensor to_channels_last(const at::Tensor& x) { return x.movedim(1, -1).contiguous().movedim(-1, 1); }

// Tensors in the sample layout of the kernels, copied only if they have another layout.
class Aligned {
 public:
  // For paths that passed `check_paths`: keeps the layouts [C, *S] and [*S, C], and copies any other. Raises if some paths are
  // NCHW and others channels_last: a silent copy would cost more than the routing.
  Aligned(const char* label, at::TensorList xs) : given_(xs) {
    const auto first = [](const at::Tensor& x) { return sample_is_dense(x, false); };
    const auto last = [](const at::Tensor& x) { return sample_is_dense(x, true); };
    if (std::all_of(xs.begin(), xs.end(), first) || std::all_of(xs.begin(), xs.end(), last)) return;
    const auto only_first = std::find_if(xs.begin(), xs.end(), [&](const at::Tensor& x) { return first(x) && !last(x); });
    const auto only_last = std::find_if(xs.begin(), xs.end(), [&](const at::Tensor& x) { return last(x) && !first(x); });
    TORCH_CHECK_VALUE(
        only_first == xs.end() || only_last == xs.end(), label, "[", only_first - xs.begin(), "] is contiguous and ",
        label, "[", only_last - xs.begin(), "] is channels_last; every path must have the same memory format");
    const bool channels_last = only_last != xs.end();
    for (const at::Tensor& x : xs) {
      copies_.push_back(sample_is_dense(x, channels_last) ? x : channels_last ? to_channels_last(x) : x.contiguous());
    }
  }

  // For paths that a forward saved: in the sample layout of the first. A compiled graph may mix layouts.
  static Aligned saved(at::TensorList xs) {
    const Aligned first("xs", xs.slice(0, 1));
    return Aligned(xs, first[0]);
  }

  // For incoming gradients: converts to the layout and type of the paths `like`, and copies only if they differ.
  Aligned(at::TensorList xs, const at::Tensor& like) : given_(xs) {
    const bool channels_last = !sample_is_dense(like, false);
    const auto type = like.scalar_type();
    const auto fits = [&](const at::Tensor& x) {
      return x.scalar_type() == type && sample_is_dense(x, channels_last);
    };
    if (std::all_of(xs.begin(), xs.end(), fits)) return;
    for (const at::Tensor& x : xs) {
      const at::Tensor y = x.to(type);
      copies_.push_back(sample_is_dense(y, channels_last) ? y : channels_last ? to_channels_last(y) : y.contiguous());
    }
  }

  operator at::TensorList() const { return copies_.empty() ? given_ : at::TensorList(copies_); }
  const at::Tensor& operator[](size_t i) const { return static_cast<at::TensorList>(*this)[i]; }

 private:
  at::TensorList given_;
  std::vector<at::Tensor> copies_;
};

// Returns a gate parameter in the accumulation type and contiguous; usually it already is.
inline at::Tensor parameter(const at::Tensor& p, at::ScalarType type, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK(p.defined(), "a gate parameter is missing");
  TORCH_CHECK(p.sizes() == shape && p.device() == x.device(), "a gate parameter has shape ", p.sizes(), ", not ", shape);
  return p.to(type).contiguous();
}

inline at::Tensor parameter(const OptionalTensor& p, at::ScalarType type, at::IntArrayRef shape, const at::Tensor& x) {
  return p.has_value() ? parameter(*p, type, shape, x) : at::Tensor();
}

inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Same as fastroute.ops._paths.empty_path: x's sample strides, with a dense batch dimension.
inline std::vector<int64_t> path_strides(const at::Tensor& x) {
  std::vector<int64_t> strides = x.strides().vec();
  strides[0] = Geometry(x).elements();
  return strides;
}

// Strides of a map (N, C, *S) that is dense in memory as [N, C, *S] or [N, *S, C].
inline std::vector<int64_t> dense_strides(at::IntArrayRef shape, bool channels_last) {
  std::vector<int64_t> strides(shape.size());
  int64_t expected = 1;
  const auto next = [&](size_t dim) {
    strides[dim] = expected;
    expected *= shape[dim];
  };
  if (channels_last) next(1);
  for (size_t dim = shape.size() - 1; dim >= 2; --dim) next(dim);
  if (!channels_last) next(1);
  next(0);
  return strides;
}

inline at::Tensor empty_path(const at::Tensor& x) {
  return at::empty_strided(x.sizes(), path_strides(x), x.options());
}

inline std::vector<at::Tensor> empty_paths(const at::Tensor& x, int64_t count) {
  std::vector<at::Tensor> paths;
  paths.reserve(count);
  for (int64_t i = 0; i < count; ++i) paths.push_back(empty_path(x));
  return paths;
}

// Data pointer; null for an absent tensor.
template <typename A>
const A* data(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

// Calls f<T>() with the element type T of the paths.
template <typename F>
decltype(auto) dispatch(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat: return f.template operator()<float>();
    case at::kDouble: return f.template operator()<double>();
    case at::kBFloat16: return f.template operator()<at::BFloat16>();
    case at::kHalf: return f.template operator()<at::Half>();
    default: TORCH_CHECK(false, "paths of type ", type, " are not served");
  }
}

// The gate's parameters in the accumulation type, and the sizes that they define.
struct Parameters {
  int64_t m, n, channels, hidden;
  at::Tensor w1, b1, w2, b2;

  Parameters(
      at::TensorList xs, const OptionalTensor& w1_, const OptionalTensor& b1_, const at::Tensor& w2_,
      const OptionalTensor& b2_) {
    const at::Tensor& x = first_path(xs);
    const auto type = accumulate_type(x.scalar_type());
    TORCH_CHECK(w2_.dim() == 3 && (!w1_.has_value() || w1_->dim() == 3), "w1 and w2 must have three dimensions");
    m = static_cast<int64_t>(xs.size());
    n = w2_.size(1);
    channels = x.size(1);
    hidden = w1_.has_value() ? w1_->size(1) : 0;
    TORCH_CHECK(n >= 1 && n <= kMaxPaths, "1 to 8 outputs are served, not ", n);
    w1 = parameter(w1_, type, {m, hidden, channels}, x);
    b1 = parameter(b1_, type, {m, hidden}, x);
    w2 = parameter(w2_, type, {m, n, hidden ? hidden : channels}, x);
    b2 = parameter(b2_, type, {m, n}, x);
  }
};

}  // namespace fastroute
