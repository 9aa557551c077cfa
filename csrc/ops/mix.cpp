// mix (Eq. 3.7): checks, the choice of a backend, and autograd.

#include "ops/autograd.h"

#include <torch/library.h>

namespace fastroute {
namespace {

using Paths = std::vector<at::Tensor>;

const auto& forward_op() {
  static const Operator<Paths(at::TensorList, const at::Tensor&)> op("mix");
  return op;
}

const auto& backward_op() {
  static const Operator<std::tuple<Paths, at::Tensor>(at::TensorList, at::TensorList, const at::Tensor&, bool)> op(
      "mix_backward");
  return op;
}

Paths mix(at::TensorList xs, const at::Tensor& gates) {
  check_paths("xs", xs);
  check_gates(gates, xs);
  const Aligned paths("xs", xs);
  return compute(forward_op(), paths[0], kFirstForOnePass, at::TensorList(paths), gates);
}

std::tuple<Paths, at::Tensor> mix_backward(
    at::TensorList grad_outputs, at::TensorList xs, const at::Tensor& gates, bool grad_inputs) {
  check_paths("xs", xs);
  const Aligned paths = Aligned::saved(xs), grads(grad_outputs, paths[0]);
  return compute(
      backward_op(), paths[0], kFirstForOnePass, at::TensorList(grads), at::TensorList(paths), gates, grad_inputs);
}

struct Function : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList xs, const at::Tensor& gates, bool recorded) {
    ctx->set_materialize_grads(false);
    variable_list saved = {gates};
    saved.insert(saved.end(), xs.begin(), xs.end());
    ctx->save_for_backward(std::move(saved));
    return call_forward(forward_op(), recorded, xs, gates);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& gates = saved[0];
    const at::TensorList xs = at::TensorList(saved).slice(1);
    materialize(grads, xs[0]);
    auto [results, grad_gates] =
        call_backward(backward_op(), at::TensorList(grads), xs, gates, any_needs_grad(ctx, 0, xs.size()));
    results.resize(xs.size());
    results.push_back(in_type_of(grad_gates, gates));
    results.emplace_back();  // no gradient for recorded
    return std::move(results);
  }
};

Paths autograd(at::TensorList xs, const at::Tensor& gates) {
  return Function::apply(xs, gates, torch::autograd::compute_requires_grad(xs, gates));
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, m) {
  m.impl("mix", &fastroute::mix);
  m.impl("mix_backward", &fastroute::mix_backward);
}

TORCH_LIBRARY_IMPL(fastroute, Autograd, m) {
  m.impl("mix", &fastroute::autograd);
}
