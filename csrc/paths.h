// Lists of parallel paths (N, C, *S): the checks that memory safety needs, sample layout, and allocation of outputs.
// fastroute.ops has the checks that explain themselves.

#pragma once

#include "common.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace fastroute {

using OptionalTensor = std::optional<at::Tensor>;
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

// N samples of C channels and S pixels, each sample dense as [C, S] or as [S, C].
struct Geometry {
  int64_t batch, channels, size;
  bool channels_last;

  explicit Geometry(const at::Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), size(1), channels_last(!sample_is_dense(x, false)) {
    for (int64_t dim = 2; dim < x.dim(); ++dim) size *= x.size(dim);
  }
  int64_t elements() const { return channels * size; }
};

inline void check_paths(at::TensorList xs, const at::Tensor& like) {
  TORCH_CHECK(!xs.empty() && static_cast<int64_t>(xs.size()) <= kMaxPaths, "1 to 8 paths are served, not ", xs.size());
  const bool channels_last = !sample_is_dense(like, false);
  for (const auto& x : xs) {
    TORCH_CHECK(
        x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() && x.device() == like.device() &&
            x.dim() >= 2 && (x.size(0) == 0 || sample_is_dense(x, channels_last)),
        "paths differ in shape, type, device or memory format");
  }
}

// A gate parameter in the accumulation type and contiguous, which it mostly is already.
inline at::Tensor parameter(const at::Tensor& p, at::ScalarType type, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK(p.sizes() == shape && p.device() == x.device(), "a gate parameter has shape ", p.sizes(), ", not ", shape);
  return p.to(type).contiguous();
}

inline at::Tensor parameter(const OptionalTensor& p, at::ScalarType type, at::IntArrayRef shape, const at::Tensor& x) {
  return p.has_value() ? parameter(*p, type, shape, x) : at::Tensor();
}

inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// As fastroute.ops._paths.empty_path: x's sample strides, samples next to each other.
inline std::vector<int64_t> path_strides(const at::Tensor& x) {
  std::vector<int64_t> strides = x.strides().vec();
  strides[0] = Geometry(x).elements();
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

// Null for an absent tensor.
template <typename A>
const A* data(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<A>() : nullptr;
}

// Calls f<T>() with the number type T of the paths.
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

// The gate's parameters in the accumulation type, and the sizes that they fix.
struct Parameters {
  int64_t m, n, channels, hidden;
  at::Tensor w1, b1, w2, b2;

  Parameters(
      at::TensorList xs, const OptionalTensor& w1_, const OptionalTensor& b1_, const at::Tensor& w2_,
      const OptionalTensor& b2_) {
    const at::Tensor& x = xs[0];
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
