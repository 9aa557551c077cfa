// cross_connect (Alg. 2): checks, the choice of a backend, and autograd.

#include "ops/autograd.h"

#include <torch/library.h>

namespace fastroute {
namespace {

using ForwardSignature =
    Forward(at::TensorList, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&, bool);
using BackwardSignature = Backward(
    at::TensorList, const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
    const OptionalTensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, bool, bool);

const auto& forward_op() {
  static const Operator<ForwardSignature> op("cross_connect");
  return op;
}

const auto& backward_op() {
  static const Operator<BackwardSignature> op("cross_connect_backward");
  return op;
}

Forward cross_connect(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, bool relu) {
  check_paths("xs", xs);
  check_gate(xs, w1, b1, w2, b2);
  const Aligned paths("xs", xs);
  const First first = first_for_two_reads(paths[0], xs.size(), w2.size(1), w1 ? w1->size(1) : 0, relu, false);
  return compute(forward_op(), paths[0], first, at::TensorList(paths), w1, b1, w2, b2, relu);
}

Backward cross_connect_backward(
    at::TensorList grad_outputs, const OptionalTensor& grad_gates, const OptionalTensor& grad_scores,
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, const at::Tensor& gates, const at::Tensor& pooled, const at::Tensor& hidden,
    bool relu, bool grad_inputs) {
  check_paths("xs", xs);
  const Aligned paths = Aligned::saved(xs), grads(grad_outputs, paths[0]);
  const First first = first_for_two_reads(paths[0], xs.size(), w2.size(1), w1 ? w1->size(1) : 0, relu, true);
  return compute(
      backward_op(), paths[0], first, at::TensorList(grads), grad_gates, grad_scores, at::TensorList(paths), w1,
      b1, w2, b2, gates, pooled, hidden, relu, grad_inputs);
}

struct Function : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kOthers = 7;  // saved in addition to the paths

  // Non-differentiable results are returned by pointer: compiled autograd does not support `mark_non_differentiable`.
  static variable_list forward(
      AutogradContext* ctx, at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1,
      const at::Tensor& w2, const OptionalTensor& b2, bool relu, bool recorded, at::Tensor* pooled, at::Tensor* hidden) {
    auto [results, gates, scores, pooled_, hidden_] = call_forward(forward_op(), recorded, xs, w1, b1, w2, b2, relu);
    ctx->saved_data["relu"] = relu;
    ctx->set_materialize_grads(false);
    variable_list saved = {undefined_or(w1), undefined_or(b1), w2, undefined_or(b2), gates, pooled_, hidden_};
    saved.insert(saved.end(), xs.begin(), xs.end());
    ctx->save_for_backward(std::move(saved));
    *pooled = std::move(pooled_);
    *hidden = std::move(hidden_);
    results.insert(results.end(), {gates, scores});
    return std::move(results);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList xs = at::TensorList(saved).slice(kOthers);
    const OptionalTensor w1 = optional(saved[0]), b1 = optional(saved[1]), b2 = optional(saved[3]);
    const at::Tensor& w2 = saved[2];
    const size_t n = grads.size() - 2;
    const OptionalTensor grad_gates = optional(grads[n]), grad_scores = optional(grads[n + 1]);
    grads.resize(n);
    materialize(grads, xs[0]);
    const bool grad_inputs = any_needs_grad(ctx, 0, xs.size());
    auto [results, grad_w1, grad_b1, grad_w2, grad_b2] = call_backward(
        backward_op(), at::TensorList(grads), grad_gates, grad_scores, xs, w1, b1, w2, b2, saved[4], saved[5], saved[6],
        ctx->saved_data["relu"].toBool(), grad_inputs);
    results.resize(xs.size());
    results.push_back(in_type_of(grad_w1, w1));
    results.push_back(in_type_of(grad_b1, b1));
    results.push_back(in_type_of(grad_w2, w2));
    results.push_back(in_type_of(grad_b2, b2));
    results.resize(results.size() + 4);  // no gradients for relu, recorded and the pointers
    return std::move(results);
  }
};

Forward autograd(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, bool relu) {
  at::Tensor pooled, hidden;
  const bool recorded = torch::autograd::compute_requires_grad(xs, w1, b1, w2, b2);
  const variable_list results = Function::apply(xs, w1, b1, w2, b2, relu, recorded, &pooled, &hidden);
  const size_t n = results.size() - 2;
  return {leading(results, n), results[n], results[n + 1], pooled, hidden};
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, m) {
  m.impl("cross_connect", &fastroute::cross_connect);
  m.impl("cross_connect_backward", &fastroute::cross_connect_backward);
}

TORCH_LIBRARY_IMPL(fastroute, Autograd, m) {
  m.impl("cross_connect", &fastroute::autograd);
}

// For tests: whether the compiled kernels are preferred to Triton, on a GPU that has thread-block clusters, by sizes alone.
TORCH_LIBRARY_FRAGMENT(fastroute_native, m) {
  m.def(
      "cuda_prefers_native(int samples, int channels, int space, bool channels_last, int element_bytes, int m, int n,"
      " int hidden, bool relu, bool backward) -> bool",
      [](int64_t samples, int64_t channels, int64_t space, bool channels_last, int64_t element_bytes, int64_t m,
         int64_t n, int64_t hidden, bool relu, bool backward) {
        const fastroute::cuda::Shape shape{samples, channels, space, channels_last};
        return fastroute::first_for_two_reads(shape, element_bytes, m, n, hidden, relu, backward) !=
               fastroute::First::kTriton;
      });
}
