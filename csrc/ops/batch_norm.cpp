// Batch normalisation with the addition and the ReLU behind it: schemas, checks and autograd. It serves the networks' blocks on a
// CPU and has no other implementation: PyTorch's own layers compute the same (fastroute/nn/blocks.py).

#include "ops/autograd.h"

#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/library.h>

namespace fastroute {
namespace {

using Normalized = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients4 = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

const auto& forward_op() {
  static const auto op = find_operator<Normalized(
      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, double, bool)>("fastroute_native::batch_norm");
  return op;
}

const auto& backward_op() {
  static const auto op = find_operator<Gradients4(
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
      const at::Tensor&, double, bool, bool)>("fastroute_native::batch_norm_backward");
  return op;
}

struct Function : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;

  // Returns y alone, which has a derivative; the moments of the batch are passed out by `moments`.
  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
      const OptionalTensor& bias, const OptionalTensor& mean, const OptionalTensor& variance, double eps, bool relu,
      Normalized* result) {
    at::AutoDispatchBelowAutograd below;
    *result = forward_op().call(x, residual, weight, bias, mean, variance, eps, relu);
    const auto& [y, batch_mean, batch_variance] = *result;
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["batch"] = !mean.has_value();
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["bias"] = bias.has_value() ? static_cast<int64_t>(bias->scalar_type()) : int64_t{-1};
    // Running statistics may be updated before the backward.
    ctx->save_for_backward(
        {x, undefined_or(weight), mean ? mean->clone() : batch_mean, variance ? variance->clone() : batch_variance,
         relu ? y : at::Tensor()});
    return {y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    constexpr size_t kArguments = 9;
    variable_list results(kArguments);
    if (!grads[0].defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &mean = saved[2], &variance = saved[3];
    const OptionalTensor weight = optional(saved[1]), y = optional(saved[4]);
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool batch = ctx->saved_data["batch"].toBool(), added = ctx->saved_data["residual"].toBool();
    const int64_t bias_type = ctx->saved_data["bias"].toInt();
    at::Tensor grad_weight, grad_bias;
    if (at::GradMode::is_enabled() || grads[0]._fw_grad(0).defined()) {  // to be differentiated again: PyTorch's operators
      const auto type = accumulate_type(x.scalar_type());
      const at::Tensor grad = y ? at::threshold_backward(grads[0], *y, 0) : grads[0];
      const OptionalTensor w = weight ? OptionalTensor(weight->to(type)) : weight;
      const at::Tensor m = mean.to(type), v = variance.to(type);
      std::tie(results[0], grad_weight, grad_bias) = at::native_batch_norm_backward(
          grad, x, w, m, v, m, v.add(eps).rsqrt(), batch, eps, {true, true, true});
      if (added) results[1] = grad;
    } else {
      at::AutoDispatchBelowAutograd below;
      const bool written = added && y;
      at::Tensor grad_residual;
      std::tie(results[0], grad_residual, grad_weight, grad_bias) =
          backward_op().call(grads[0], y, x, weight, mean, variance, eps, batch, written);
      if (added) results[1] = written ? grad_residual : grads[0];
    }
    results[2] = in_type_of(grad_weight, weight);
    if (bias_type >= 0) results[3] = grad_bias.to(static_cast<at::ScalarType>(bias_type));
    return results;
  }
};

Normalized autograd(
    const at::Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& mean, const OptionalTensor& variance, double eps, bool relu) {
  Normalized result;
  std::get<0>(result) = Function::apply(x, residual, weight, bias, mean, variance, eps, relu, &result)[0];
  return result;
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_FRAGMENT(fastroute_native, m) {
  // y = ReLU((x − mean) / √(variance + eps) · weight + bias + residual), without the ReLU unless `relu`, for maps (N, C, *S) of one
  // memory format. Without a mean and a variance, takes and returns those of the batch, the variance not corrected.
  m.def(
      "batch_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, float eps,"
      " bool relu) -> (Tensor y, Tensor mean, Tensor variance)",
      {at::Tag::pt2_compliant_tag});
  // y is the output if there was a ReLU. `batch`: mean and variance are those of the batch. `residual`: the gradient of the residual
  // is wanted; without a ReLU it is that of y.
  m.def(
      "batch_norm_backward(Tensor grad, Tensor? y, Tensor x, Tensor? weight, Tensor mean, Tensor variance, float eps,"
      " bool batch, bool residual) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastroute_native, AutogradCPU, m) {
  m.impl("batch_norm", &fastroute::autograd);
}
