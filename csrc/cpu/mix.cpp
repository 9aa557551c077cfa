// The cross-path weighted sum (Eq. 3.7) with given gates, and its backward.

#include "cpu/route.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace fastroute {
namespace {

// Gates (m, n), the same for all samples, or (N, m, n), in the accumulation type.
struct Gates {
  int64_t n, batch_stride;
  at::Tensor values;

  Gates(const at::Tensor& gates, at::TensorList xs) {
    const at::Tensor& x = xs[0];
    const int64_t m = static_cast<int64_t>(xs.size());
    TORCH_CHECK(gates.dim() == 2 || gates.dim() == 3, "gates must have two or three dimensions, not ", gates.dim());
    n = gates.size(-1);
    TORCH_CHECK(n >= 1 && n <= kMaxPaths, "1 to 8 outputs are served, not ", n);
    batch_stride = gates.dim() == 3 ? m * n : 0;
    const auto type = accumulate_type(x.scalar_type());
    values = gates.dim() == 3 ? parameter(gates, type, {x.size(0), m, n}, x) : parameter(gates, type, {m, n}, x);
  }
};

std::vector<at::Tensor> mix(at::TensorList xs, const at::Tensor& gates_) {
  const at::Tensor& x0 = aligned_path(xs);
  const Geometry g(x0);
  const Gates gates(gates_, xs);
  std::vector<at::Tensor> outputs = allocate_paths(x0, gates.n);
  dispatch(x0.scalar_type(), [&]<typename T>() {
    const Paths<const T> x(xs);
    const Paths<T> y(outputs);
    const auto* values = gates.values.const_data_ptr<accumulate_t<T>>();
    const bool stream = streams_forward(y, x.count, g);
    if (shares_samples(g, x.count + gates.n, sizeof(T))) {
      mix_together(x, values, gates.batch_stride, y, g, stream);
      return;
    }
    for_samples(g, x.count + gates.n, sizeof(T), [&](int64_t begin, int64_t end) {
      WeightedSums<T> sums;
      for (int64_t s = begin; s < end; ++s) {
        sums.xs = x.sample(s);
        sums.ys = y.sample(s);
        sums.n = gates.n;
        transpose_weights(values + s * gates.batch_stride, x.count, gates.n, sums.weights);
        mix_sample(sums, x.count, g, stream);
      }
      stream_fence();
    });
  });
  return outputs;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> mix_backward(
    at::TensorList grad_outputs, at::TensorList xs, const at::Tensor& gates_, bool grad_inputs) {
  const at::Tensor& x0 = aligned_path(xs);
  check_aligned(grad_outputs, x0);
  const Geometry g(x0);
  const Gates gates(gates_, xs);
  const int64_t m = static_cast<int64_t>(xs.size()), n = gates.n;
  TORCH_CHECK(static_cast<int64_t>(grad_outputs.size()) == n, "as many gradients as outputs are needed");
  std::vector<at::Tensor> grad_xs = allocate_paths(x0, grad_inputs ? m : 0);
  at::Tensor per_sample = at::empty({g.batch, m, n}, gates.values.options());
  dispatch(x0.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<const T> x(xs), dy(grad_outputs);
    const Paths<T> dx(grad_xs);
    const A* values = gates.values.const_data_ptr<A>();
    A* d_gates = per_sample.mutable_data_ptr<A>();
    const bool stream = grad_inputs && streamable(dx, g);
    for_samples(g, 2 * m + n, sizeof(T), [&](int64_t begin, int64_t end) {
      WeightedSums<T> sums;
      for (int64_t s = end; s-- > begin;) {  // reversed: the last samples are still in cache
        const auto products = inner_products_of_sample(x.sample(s), m, dy.sample(s), n, g);  // Eq. 3.10
        for (int64_t k = 0; k < m * n; ++k) d_gates[s * m * n + k] = static_cast<A>(products[k / n][k % n]);
        if (!grad_inputs) continue;
        sums.xs = dy.sample(s);
        sums.ys = dx.sample(s);
        sums.n = m;
        copy_weights(values + s * gates.batch_stride, m, n, sums.weights);
        look_ahead(sums, {&x, &dy}, s - 1, g);
        mix_sample(sums, n, g, stream);  // the first term of Eq. 3.15
      }
      stream_fence();
    });
  });
  return {std::move(grad_xs), gates_.dim() == 3 ? per_sample : per_sample.sum(0)};
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("mix", &fastroute::mix);
  m.impl("mix_backward", &fastroute::mix_backward);
}
