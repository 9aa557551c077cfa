// Helpers of the operators' autograd functions.

#pragma once

#include "ops/route.h"

#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <vector>

namespace fastroute {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Calls a forward through the dispatcher below autograd. The gradient mode, which Function::apply disables, is restored to tell
// the kernels whether a backward follows; in a compiled graph this is unknown.
template <typename Signature, typename... Args>
auto call_forward(const Operator<Signature>& op, bool recorded, const Args&... args) {
  at::AutoDispatchBelowAutograd below;
  at::AutoGradMode mode(recorded);
  return op.public_.call(args...);
}

inline bool has_tangent(const at::Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }
inline bool has_tangent(const OptionalTensor& t) { return t && has_tangent(*t); }
inline bool has_tangent(const at::TensorList& list) {
  return std::any_of(list.begin(), list.end(), [](const at::Tensor& t) { return has_tangent(t); });
}
inline bool has_tangent(const std::vector<at::Tensor>& list) { return has_tangent(at::TensorList(list)); }
template <typename T>
bool has_tangent(const T&) {
  return false;
}

// Calls a backward through the dispatcher: below autograd, unless it is to be differentiated.
template <typename Signature, typename... Args>
auto call_backward(const Operator<Signature>& op, const Args&... args) {
  TORCH_CHECK(
      !(has_tangent(args) || ...), "the gradient of an operator's result has a forward-mode tangent, but the operator was "
      "called without forward AD: call it inside of torch.autograd.forward_ad.dual_level() too");
  if (at::GradMode::is_enabled()) return op.public_.call(args...);
  at::AutoDispatchBelowAutograd below;
  return op.public_.call(args...);
}

inline OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

inline at::Tensor undefined_or(const OptionalTensor& t) { return t.value_or(at::Tensor()); }

// Replaces absent gradients by zeros.
inline void materialize(variable_list& grads, const at::Tensor& like) {
  for (auto& grad : grads) {
    if (!grad.defined()) grad = at::zeros_like(like);
  }
}

inline bool any_needs_grad(AutogradContext* ctx, size_t first, size_t count) {
  for (size_t i = first; i < first + count; ++i) {
    if (ctx->needs_input_grad(i)) return true;
  }
  return false;
}

// Returns a parameter's gradient in the parameter's type; undefined without a parameter.
inline at::Tensor in_type_of(const at::Tensor& grad, const OptionalTensor& parameter) {
  return parameter ? grad.to(parameter->scalar_type()) : at::Tensor();
}

// Returns the first `count` results as a vector.
inline std::vector<at::Tensor> leading(const variable_list& results, size_t count) {
  return {results.begin(), results.begin() + static_cast<std::ptrdiff_t>(count)};
}

}  // namespace fastroute
