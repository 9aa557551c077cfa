// gate (Eq. 3.3 to 3.5): checks, the choice of a backend, and autograd.

#include "ops/autograd.h"

#include <torch/library.h>

namespace fastroute {
namespace {

using Gates = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

const auto& forward_op() {
  static const Operator<Gates(
      at::TensorList, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&)>
      op("gate");
  return op;
}

const auto& backward_op() {
  static const Operator<Gradients(
      const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&, const OptionalTensor&,
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>
      op("gate_backward");
  return op;
}

Gates gate(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2) {
  check_paths("xs", xs);
  check_gate(xs, w1, b1, w2, b2);
  const Aligned paths("xs", xs);
  return compute(forward_op(), paths[0], kFirstForOnePass, at::TensorList(paths), w1, b1, w2, b2);
}

Gradients gate_backward(
    const OptionalTensor& grad_gates, const OptionalTensor& grad_scores, at::TensorList xs, const OptionalTensor& w1,
    const OptionalTensor& b1, const at::Tensor& w2, const OptionalTensor& b2, const at::Tensor& gates,
    const at::Tensor& pooled, const at::Tensor& hidden) {
  check_paths("xs", xs);
  const Aligned paths = Aligned::saved(xs);
  return compute(
      backward_op(), paths[0], kFirstForOnePass, grad_gates, grad_scores, at::TensorList(paths), w1, b1, w2, b2,
      gates, pooled, hidden);
}

struct Function : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kOthers = 7;  // saved in addition to the paths

  // Non-differentiable results are returned by pointer, as in cross_connect.
  static variable_list forward(
      AutogradContext* ctx, at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1,
      const at::Tensor& w2, const OptionalTensor& b2, bool recorded, at::Tensor* pooled, at::Tensor* hidden) {
    auto [gates, scores, pooled_, hidden_] = call_forward(forward_op(), recorded, xs, w1, b1, w2, b2);
    ctx->set_materialize_grads(false);
    variable_list saved = {undefined_or(w1), undefined_or(b1), w2, undefined_or(b2), gates, pooled_, hidden_};
    saved.insert(saved.end(), xs.begin(), xs.end());
    ctx->save_for_backward(std::move(saved));
    *pooled = std::move(pooled_);
    *hidden = std::move(hidden_);
    return {gates, scores};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList xs = at::TensorList(saved).slice(kOthers);
    const OptionalTensor w1 = optional(saved[0]), b1 = optional(saved[1]), b2 = optional(saved[3]);
    const at::Tensor& w2 = saved[2];
    auto [shares, grad_w1, grad_b1, grad_w2, grad_b2] = call_backward(
        backward_op(), optional(grads[0]), optional(grads[1]), xs, w1, b1, w2, b2, saved[4], saved[5], saved[6]);
    // Expanded, not copied: it is broadcast over space when it is added to the other gradients of X. Sizes are symbolic, for a
    // compiled graph that takes any batch.
    std::vector<c10::SymInt> sizes = shares.sym_sizes().vec();
    sizes.resize(xs[0].dim() + 1, 1);
    variable_list results;
    const at::Tensor per_path = shares.to(xs[0].scalar_type()).reshape_symint(sizes);
    for (size_t i = 0; i < xs.size(); ++i) results.push_back(per_path.select(1, static_cast<int64_t>(i)).expand_as(xs[i]));
    results.push_back(in_type_of(grad_w1, w1));
    results.push_back(in_type_of(grad_b1, b1));
    results.push_back(in_type_of(grad_w2, w2));
    results.push_back(in_type_of(grad_b2, b2));
    results.resize(results.size() + 3);  // no gradients for recorded and the pointers
    return results;
  }
};

Gates autograd(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2) {
  at::Tensor pooled, hidden;
  const bool recorded = torch::autograd::compute_requires_grad(xs, w1, b1, w2, b2);
  const variable_list results = Function::apply(xs, w1, b1, w2, b2, recorded, &pooled, &hidden);
  return {results[0], results[1], pooled, hidden};
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, m) {
  m.impl("gate", &fastroute::gate);
  m.impl("gate_backward", &fastroute::gate_backward);
}

TORCH_LIBRARY_IMPL(fastroute, Autograd, m) {
  m.impl("gate", &fastroute::autograd);
}
