// The gates of cross-connection and cross-prediction without routing (Eq. 3.3 to 3.5), and their backward.

#include "cuda/tensors.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace fastroute::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gate(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2) {
  const at::Tensor& x = aligned_path(xs);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Shape shape = shape_of(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto options = p.w2.options();
  at::Tensor gates = at::empty({shape.samples, p.m, p.n}, options), scores = at::empty_like(gates);
  at::Tensor pooled = at::empty({shape.samples, p.m, p.channels}, options);
  at::Tensor hidden = at::empty({shape.samples, p.m, p.hidden}, options);
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const at::Tensor sums = sums_over_space<T>(inputs<T>(xs), shape, options, stream);
    C10_CUDA_CHECK(gates_forward<A>(
        gate_of<A>(p), shape, sums.size(0), data<A>(sums), pooled.mutable_data_ptr<A>(), hidden.mutable_data_ptr<A>(),
        scores.mutable_data_ptr<A>(), gates.mutable_data_ptr<A>(), stream));
  });
  return {gates, scores, pooled, hidden};
}

Gradients gate_backward(
    const OptionalTensor& grad_gates, const OptionalTensor& grad_scores, at::TensorList xs, const OptionalTensor& w1,
    const OptionalTensor& b1, const at::Tensor& w2, const OptionalTensor& b2, const at::Tensor& gates_,
    const at::Tensor& pooled_, const at::Tensor& hidden_) {
  const at::Tensor& x = first_path(xs);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Shape shape = shape_of(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto type = accumulate_type(x.scalar_type());
  const at::Tensor dg = parameter(grad_gates, type, {shape.samples, p.m, p.n}, x);
  const at::Tensor da = parameter(grad_scores, type, {shape.samples, p.m, p.n}, x);
  const at::Tensor gates = parameter(gates_, type, {shape.samples, p.m, p.n}, x);
  const at::Tensor pooled = parameter(pooled_, type, {shape.samples, p.m, p.channels}, x);
  const at::Tensor hidden = parameter(hidden_, type, {shape.samples, p.m, p.hidden}, x);
  at::Tensor d_scores = at::empty_like(gates), d_hidden = at::empty_like(hidden), shares = at::empty_like(pooled);
  ParameterGradients grads(p);
  dispatch(type, [&]<typename A>() {
    if constexpr (std::is_same_v<A, accumulate_t<A>>) {
      C10_CUDA_CHECK(gates_backward<A>(  // without products: only the incoming gradients
          gate_of<A>(p), shape, 0, nullptr, data<A>(dg), data<A>(da), data<A>(gates), data<A>(hidden),
          d_scores.mutable_data_ptr<A>(), d_hidden.mutable_data_ptr<A>(), shares.mutable_data_ptr<A>(), stream));
      grads.compute<A>(d_scores, d_hidden, pooled, hidden, stream);
    }
  });
  return {shares, grads.w1, grads.b1, grads.w2, grads.b2};
}

}  // namespace
}  // namespace fastroute::cuda

TORCH_LIBRARY_IMPL(fastroute_native, CUDA, m) {
  m.impl("gate", &fastroute::cuda::gate);
  m.impl("gate_backward", &fastroute::cuda::gate_backward);
}
