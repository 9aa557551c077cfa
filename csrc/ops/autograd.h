// What the operators' autograd functions share.

#pragma once

#include "ops/route.h"

#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace fastroute {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A forward through the dispatcher below autograd. The gradient mode, which Function::apply turns off, tells the kernels
// whether a backward is known to follow; of one in a compiled graph nothing is known here.
template <typename Signature, typename... Args>
auto call_forward(const Operator<Signature>& op, bool recorded, const Args&... args) {
  at::AutoDispatchBelowAutograd below;
  at::AutoGradMode mode(recorded);
  return op.public_.call(args...);
}

// A backward through the dispatcher: below autograd, unless it is to be differentiated itself.
template <typename Signature, typename... Args>
auto call_backward(const Operator<Signature>& op, const Args&... args) {
  if (at::GradMode::is_enabled()) return op.public_.call(args...);
  at::AutoDispatchBelowAutograd below;
  return op.public_.call(args...);
}

inline OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

inline at::Tensor undefined_or(const OptionalTensor& t) { return t.value_or(at::Tensor()); }

// Zeros for the gradients that are absent.
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

// A parameter's gradient in its own type; undefined where there is no parameter.
inline at::Tensor in_type_of(const at::Tensor& grad, const OptionalTensor& parameter) {
  return parameter ? grad.to(parameter->scalar_type()) : at::Tensor();
}

// The first `count` results as a vector.
inline std::vector<at::Tensor> leading(const variable_list& results, size_t count) {
  return {results.begin(), results.begin() + static_cast<std::ptrdiff_t>(count)};
}

}  // namespace fastroute
