// cross_predict (Alg. 1): checks, the choice of a backend, and autograd.

#include "ops/autograd.h"

#include <torch/library.h>

namespace fastroute {
namespace {

using Paths = std::vector<at::Tensor>;
using Predicted = std::tuple<Paths, at::Tensor, at::Tensor, at::Tensor>;

const auto& forward_op() {
  static const Operator<Paths(
      at::TensorList, const at::Tensor&, const OptionalTensor&, const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
      at::IntArrayRef, bool, c10::string_view)>
      op("cross_predict");
  return op;
}

const auto& backward_op() {
  static const Operator<Predicted(
      at::TensorList, at::TensorList, at::TensorList, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
      at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, bool)>
      op("cross_predict_backward");
  return op;
}

void check(
    at::TensorList xs, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& gates,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_paths("xs", xs);
  check_given("weight", weight);
  check_given("gates", gates);
  const at::Tensor& x = xs[0];
  const int64_t m = static_cast<int64_t>(xs.size()), rank = x.dim() - 2;
  const auto shape = weight.sizes();
  const char* kernel = rank ? ", *k" : "";
  TORCH_CHECK_VALUE(
      weight.dim() == 4 + rank && shape[1] >= 1 && shape[1] <= kMaxPaths &&
          std::find(shape.begin(), shape.end(), 0) == shape.end(),
      "weight has shape ", tuple(shape), "; it must be (m, n, C_out, C_in", kernel, ") = (", m, ", n, C_out, ",
      x.size(1), kernel, "), from m paths to n = 1 to ", kMaxPaths, ", with ", rank,
      " kernel sizes for paths of shape ", tuple(x.sizes()));
  check_geometry(rank, stride, padding, dilation);
  const int64_t n = shape[1], width = shape[2];
  std::vector<int64_t> expected = shape.vec();
  expected[0] = m;
  expected[3] = x.size(1);
  check_weight("weight", weight, expected, x);
  if (bias) check_weight("bias", *bias, {m, n, width}, x);
  check_weight("gates", gates, {x.size(0), m, n}, x);
  const auto sizes = shape.slice(4);
  for (int64_t d = 0; d < rank; ++d) {
    TORCH_CHECK_VALUE(
        x.size(2 + d) + 2 * padding[d] >= dilation[d] * (sizes[d] - 1) + 1, "xs[0] has shape ", tuple(x.sizes()),
        "; with padding=", list(padding), " and dilation=", list(dilation), " it is smaller than a kernel of ",
        tuple(sizes));
  }
}

Paths cross_predict(
    at::TensorList xs, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& gates,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu, c10::string_view form) {
  check(xs, weight, bias, gates, stride, padding, dilation);
  const Aligned paths("xs", xs);
  return compute(
      forward_op(), paths[0], kFirstForCrossPredict, at::TensorList(paths), weight, bias, gates, stride, padding,
      dilation, relu, form);
}

Predicted cross_predict_backward(
    at::TensorList grad_outputs, at::TensorList outputs, at::TensorList xs, const at::Tensor& weight,
    const OptionalTensor& bias, const at::Tensor& gates, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool grad_inputs) {
  check_paths("xs", xs);
  const Aligned paths = Aligned::saved(xs), grads(grad_outputs, paths[0]), results(outputs, paths[0]);
  return compute(
      backward_op(), paths[0], kFirstForCrossPredict, at::TensorList(grads), at::TensorList(results),
      at::TensorList(paths), weight, bias, gates, stride, padding, dilation, grad_inputs);
}

struct Function : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kOthers = 3;  // saved in addition to the paths

  static variable_list forward(
      AutogradContext* ctx, at::TensorList xs, const at::Tensor& weight, const OptionalTensor& bias,
      const at::Tensor& gates, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu,
      c10::string_view form, bool recorded) {
    variable_list outputs =
        call_forward(forward_op(), recorded, xs, weight, bias, gates, stride, padding, dilation, relu, form);
    ctx->set_materialize_grads(false);
    ctx->saved_data["m"] = static_cast<int64_t>(xs.size());
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    variable_list saved = {weight, undefined_or(bias), gates};
    saved.insert(saved.end(), xs.begin(), xs.end());
    if (relu) saved.insert(saved.end(), outputs.begin(), outputs.end());
    ctx->save_for_backward(std::move(saved));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto m = static_cast<size_t>(ctx->saved_data["m"].toInt());
    const at::TensorList all(saved), xs = all.slice(kOthers, m), outputs = all.slice(kOthers + m);
    const OptionalTensor bias = optional(saved[1]);
    const auto numbers = [&](const char* key) { return ctx->saved_data[key].toIntVector(); };
    const auto given = std::find_if(grads.begin(), grads.end(), [](const at::Tensor& grad) { return grad.defined(); });
    variable_list results(m + 3 + 6);  // no gradients for the geometry, relu, form and recorded
    if (given == grads.end()) return results;
    const at::Tensor like = *given;
    materialize(grads, like);
    auto [grad_xs, grad_weight, grad_bias, grad_gates] = call_backward(
        backward_op(), at::TensorList(grads), outputs, xs, saved[0], bias, saved[2],
        at::IntArrayRef(numbers("stride")), at::IntArrayRef(numbers("padding")), at::IntArrayRef(numbers("dilation")),
        any_needs_grad(ctx, 0, m));
    std::move(grad_xs.begin(), grad_xs.end(), results.begin());
    results[m] = in_type_of(grad_weight, saved[0]);
    results[m + 1] = in_type_of(grad_bias, bias);
    results[m + 2] = in_type_of(grad_gates, saved[2]);
    return results;
  }
};

Paths autograd(
    at::TensorList xs, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& gates,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu, c10::string_view form) {
  const bool recorded = torch::autograd::compute_requires_grad(xs, weight, bias, gates);
  return Function::apply(xs, weight, bias, gates, stride, padding, dilation, relu, form, recorded);
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, m) {
  m.impl("cross_predict", &fastroute::cross_predict);
  m.impl("cross_predict_backward", &fastroute::cross_predict_backward);
}

TORCH_LIBRARY_IMPL(fastroute, Autograd, m) {
  m.impl("cross_predict", &fastroute::autograd);
}
