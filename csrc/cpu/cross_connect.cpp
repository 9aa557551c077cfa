// Cross-connection routing (Alg. 2) and its backward (Eq. 3.10 to 3.15), one sample at a time, so that the second read
// of a sample comes from cache. With relu, max(x, 0) is applied at each read of a path.

#include "cpu/gate.h"
#include "cpu/route.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace fastroute {
namespace {

template <bool kRelu, typename T>
void forward_kernel(
    const Geometry& g, const Paths<const T>& xs, const Gate<accumulate_t<T>>& gate, const Paths<T>& ys,
    accumulate_t<T>* gates, accumulate_t<T>* scores, accumulate_t<T>* pooled, accumulate_t<T>* hidden) {
  using A = accumulate_t<T>;
  const std::vector<A> w1 = gate.w1_for(g.batch);
  const auto gate_sample = [&](int64_t s) {
    gate.forward(
        pooled + s * gate.m * g.channels, w1, hidden + s * gate.m * gate.hidden, scores + s * gate.m * gate.n,
        gates + s * gate.m * gate.n);
  };
  const bool stream = streams_forward(ys, gate.m, g);
  if (shares_samples(g, gate.m + gate.n, sizeof(T))) {
    pool_together<kRelu>(xs, g, pooled);
    for (int64_t s = 0; s < g.batch; ++s) gate_sample(s);
    mix_together<kRelu>(xs, gates, gate.m * gate.n, ys, g, stream);
    return;
  }
  for_samples(g, gate.m + gate.n, sizeof(T), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(pool_scratch<T>(g));
    WeightedSums<T> sums;
    for (int64_t s = begin; s < end; ++s) {
      const auto x = xs.sample(s);
      A* z = pooled + s * gate.m * g.channels;
      for (int64_t i = 0; i < gate.m; ++i) pool<kRelu>(x[i], g, z + i * g.channels, scratch.data());
      gate_sample(s);
      sums.xs = x;
      sums.ys = ys.sample(s);
      sums.n = gate.n;
      transpose_weights(gates + s * gate.m * gate.n, gate.m, gate.n, sums.weights);
      look_ahead(sums, {&xs}, s + 1, g);
      mix_sample<kRelu>(sums, gate.m, g, stream);
    }
    stream_fence();
  });
}

Forward cross_connect(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, bool relu) {
  const at::Tensor& x = aligned_path(xs);
  const Geometry g(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto options = x.options().dtype(accumulate_type(x.scalar_type()));
  std::vector<at::Tensor> outputs = allocate_paths(x, p.n);
  at::Tensor gates = at::empty({g.batch, p.m, p.n}, options), scores = at::empty({g.batch, p.m, p.n}, options);
  at::Tensor pooled = at::empty({g.batch, p.m, g.channels}, options);
  at::Tensor hidden = at::empty({g.batch, p.m, p.hidden}, options);
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const auto run = relu ? &forward_kernel<true, T> : &forward_kernel<false, T>;
    run(
        g, Paths<const T>(xs), gate_of<A>(p), Paths<T>(outputs), gates.mutable_data_ptr<A>(),
        scores.mutable_data_ptr<A>(), pooled.mutable_data_ptr<A>(), hidden.mutable_data_ptr<A>());
  });
  return {std::move(outputs), gates, scores, pooled, hidden};
}

template <bool kRelu, typename T>
void backward_kernel(
    const Geometry& g, const Paths<const T>& dys, const Paths<const T>& xs, const Gate<accumulate_t<T>>& gate,
    const accumulate_t<T>* grad_gates, const accumulate_t<T>* grad_scores, const accumulate_t<T>* gates,
    const accumulate_t<T>* hidden, const Paths<T>* dxs, accumulate_t<T>* d_scores, accumulate_t<T>* d_hidden) {
  using A = accumulate_t<T>;
  const int64_t m = gate.m, n = gate.n;
  const bool stream = dxs && streamable(*dxs, g);
  for_samples(g, 2 * m + n, sizeof(T), [&](int64_t begin, int64_t end) {
    std::vector<A> scratch, d_pooled(m * g.channels);
    A d_gates[kMaxPaths * kMaxPaths];
    WeightedSums<T> sums;
    for (int64_t s = end; s-- > begin;) {  // reversed: the last samples are still in cache
      const auto x = xs.sample(s), dy = dys.sample(s);
      const A* sample_gates = gates + s * m * n;
      const auto products = inner_products_of_sample<kRelu>(x, m, dy, n, g);  // Eq. 3.10
      for (int64_t k = 0; k < m * n; ++k) {
        d_gates[k] = static_cast<A>(products[k / n][k % n]) + (grad_gates ? grad_gates[s * m * n + k] : A(0));
      }
      gate.backward(
          d_gates, grad_scores ? grad_scores + s * m * n : nullptr, sample_gates, hidden + s * m * gate.hidden,
          static_cast<A>(g.size), d_scores + s * m * n, d_hidden + s * m * gate.hidden, d_pooled.data());
      if (!dxs) continue;
      sums.xs = dy;
      sums.ys = dxs->sample(s);
      sums.masks = x;
      sums.n = m;
      copy_weights(sample_gates, m, n, sums.weights);
      look_ahead(sums, {&xs, &dys}, s - 1, g);
      mix_sample<kRelu>(sums, d_pooled.data(), n, g, stream, scratch);  // Eq. 3.15
    }
    stream_fence();
  });
}

Backward cross_connect_backward(
    at::TensorList grad_outputs, const OptionalTensor& grad_gates, const OptionalTensor& grad_scores,
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, const at::Tensor& gates, const at::Tensor& pooled, const at::Tensor& hidden,
    bool relu, bool grad_inputs) {
  const at::Tensor& x = aligned_path(xs);
  check_aligned(grad_outputs, x);
  const Geometry g(x);
  const Parameters p(xs, w1, b1, w2, b2);
  const auto type = accumulate_type(x.scalar_type());
  TORCH_CHECK(static_cast<int64_t>(grad_outputs.size()) == p.n, "as many gradients as outputs are needed");
  const at::Tensor dg = parameter(grad_gates, type, {g.batch, p.m, p.n}, x);
  const at::Tensor da = parameter(grad_scores, type, {g.batch, p.m, p.n}, x);
  const at::Tensor gates_ = parameter(gates, type, {g.batch, p.m, p.n}, x);
  const at::Tensor pooled_ = parameter(pooled, type, {g.batch, p.m, g.channels}, x);
  const at::Tensor hidden_ = parameter(hidden, type, {g.batch, p.m, p.hidden}, x);

  const auto options = x.options().dtype(type);
  std::vector<at::Tensor> grad_xs = allocate_paths(x, grad_inputs ? p.m : 0);
  at::Tensor d_scores = at::empty({g.batch, p.m, p.n}, options), d_hidden = at::empty({g.batch, p.m, p.hidden}, options);
  ParameterGradients grads(p);

  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<T> dxs(grad_xs);
    const auto run = relu ? &backward_kernel<true, T> : &backward_kernel<false, T>;
    run(
        g, Paths<const T>(grad_outputs), Paths<const T>(xs), gate_of<A>(p), data<A>(dg), data<A>(da), data<A>(gates_),
        data<A>(hidden_), grad_inputs ? &dxs : nullptr, d_scores.mutable_data_ptr<A>(), d_hidden.mutable_data_ptr<A>());
    grads.compute<A>(d_scores, d_hidden, pooled_, hidden_);
  });
  return {std::move(grad_xs), grads.w1, grads.b1, grads.w2, grads.b2};
}

std::tuple<bool, bool, bool, bool> cpu_plan(const at::Tensor& x, int64_t m, int64_t n) {
  TORCH_CHECK(m >= 1 && m <= kMaxPaths && n >= 1 && n <= kMaxPaths, "1 to 8 paths are served, not ", m, " to ", n);
  const Geometry g(first_path(x));
  return dispatch(x.scalar_type(), [&]<typename T>() {
    const std::vector<at::Tensor> outputs(n, x);
    return std::make_tuple(
        streams_forward(Paths<T>(outputs), m, g), addend_of<T>(g) == Addend::kRow, looks_ahead(g, m + n, sizeof(T)),
        shares_samples(g, m + n, sizeof(T)));
  });
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("cross_connect", &fastroute::cross_connect);
  m.impl("cross_connect_backward", &fastroute::cross_connect_backward);
  m.impl("cpu_plan", &fastroute::cpu_plan);
}
