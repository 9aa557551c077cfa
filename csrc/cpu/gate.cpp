// The gates of cross-connection and cross-prediction without routing (Eq. 3.3 to 3.5), and their backward.

#include "cpu/gate.h"

#include <torch/library.h>

namespace fastroute {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gate(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2) {
  const at::Tensor& x = aligned_path(xs);
  const Geometry g(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto options = p.w2.options();
  at::Tensor gates = at::empty({g.batch, p.m, p.n}, options), scores = at::empty({g.batch, p.m, p.n}, options);
  at::Tensor pooled = at::empty({g.batch, p.m, g.channels}, options);
  at::Tensor hidden = at::empty({g.batch, p.m, p.hidden}, options);
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<const T> paths(xs);
    const Gate<A> gate = gate_of<A>(p);
    const std::vector<A> w1 = gate.w1_for(g.batch);
    A *z = pooled.mutable_data_ptr<A>(), *h = hidden.mutable_data_ptr<A>();
    A *a = scores.mutable_data_ptr<A>(), *out = gates.mutable_data_ptr<A>();
    for_samples(g, p.m, sizeof(T), [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(pool_scratch<T>(g));
      for (int64_t s = begin; s < end; ++s) {
        const auto sample = paths.sample(s);
        A* sample_z = z + s * p.m * g.channels;
        for (int64_t i = 0; i < p.m; ++i) pool(sample[i], g, sample_z + i * g.channels, scratch.data());
        gate.forward(sample_z, w1, h + s * p.m * p.hidden, a + s * p.m * p.n, out + s * p.m * p.n);
      }
    });
  });
  return {gates, scores, pooled, hidden};
}

Gradients gate_backward(
    const OptionalTensor& grad_gates, const OptionalTensor& grad_scores, at::TensorList xs, const OptionalTensor& w1,
    const OptionalTensor& b1, const at::Tensor& w2, const OptionalTensor& b2, const at::Tensor& gates,
    const at::Tensor& pooled, const at::Tensor& hidden) {
  const at::Tensor& x = first_path(xs);
  const Geometry g(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto type = accumulate_type(x.scalar_type());
  const auto options = p.w2.options();
  const at::Tensor dg = parameter(grad_gates, type, {g.batch, p.m, p.n}, x);
  const at::Tensor da = parameter(grad_scores, type, {g.batch, p.m, p.n}, x);
  const at::Tensor gates_ = parameter(gates, type, {g.batch, p.m, p.n}, x);
  const at::Tensor pooled_ = parameter(pooled, type, {g.batch, p.m, g.channels}, x);
  const at::Tensor hidden_ = parameter(hidden, type, {g.batch, p.m, p.hidden}, x);
  at::Tensor d_scores = at::empty({g.batch, p.m, p.n}, options), d_hidden = at::empty({g.batch, p.m, p.hidden}, options);
  at::Tensor shares = at::empty({g.batch, p.m, g.channels}, options);
  ParameterGradients grads(p);
  dispatch(type, [&]<typename A>() {
    if constexpr (std::is_same_v<A, accumulate_t<A>>) {
      const Gate<A> gate = gate_of<A>(p);
      const int64_t scores = p.m * p.n, width = p.m * p.hidden, channels = p.m * g.channels;
      A *to_scores = d_scores.mutable_data_ptr<A>(), *to_hidden = d_hidden.mutable_data_ptr<A>();
      A* to_shares = shares.mutable_data_ptr<A>();
      const std::vector<A> none(scores);
      for_samples(g, p.m, sizeof(A), [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          gate.backward(
              dg.defined() ? data<A>(dg) + s * scores : none.data(), da.defined() ? data<A>(da) + s * scores : nullptr,
              data<A>(gates_) + s * scores, data<A>(hidden_) + s * width, static_cast<A>(g.size), to_scores + s * scores,
              to_hidden + s * width, to_shares + s * channels);
        }
      });
      grads.compute<A>(d_scores, d_hidden, pooled_, hidden_);
    }
  });
  return {shares, grads.w1, grads.b1, grads.w2, grads.b2};
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("gate", &fastroute::gate);
  m.impl("gate_backward", &fastroute::gate_backward);
}
