// The cross-path weighted sum with given gates (Eq. 3.7, 3.8), and its backward in one read.

#include "cuda/tensors.h"

#include <torch/library.h>

namespace fastroute::cuda {
namespace {

// Gates (N, m, n), or (m, n) for all samples, in the accumulation type.
at::Tensor checked_gates(const at::Tensor& gates, at::TensorList xs, int64_t n) {
  const at::Tensor& x = xs[0];
  const auto m = static_cast<int64_t>(xs.size());
  TORCH_CHECK(n >= 1 && n <= kMaxPaths, "1 to 8 outputs are served, not ", n);
  const std::vector<int64_t> shape = gates.dim() == 2 ? std::vector{m, n} : std::vector{x.size(0), m, n};
  return parameter(gates, accumulate_type(x.scalar_type()), shape, x);
}

int64_t batch_stride(const at::Tensor& gates) { return gates.dim() == 2 ? 0 : gates.stride(0); }

std::vector<at::Tensor> mix(at::TensorList xs, const at::Tensor& gates_) {
  const at::Tensor& x = aligned_path(xs);
  const int64_t n = gates_.size(-1);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor gates = checked_gates(gates_, xs, n);
  std::vector<at::Tensor> ys = empty_paths(x, n);
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Weights<A> weights{data<A>(gates), batch_stride(gates), static_cast<int>(n), 1};
    C10_CUDA_CHECK(weighted_sums<T>(inputs<T>(xs), weights, nullptr, shape_of(x), {}, outputs<T>(ys), stream));
  });
  return ys;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> mix_backward(
    at::TensorList grad_outputs, at::TensorList xs, const at::Tensor& gates_, bool grad_inputs) {
  const at::Tensor& x = aligned_path(xs);
  check_aligned(grad_outputs, x);
  const auto m = static_cast<int64_t>(xs.size()), n = static_cast<int64_t>(grad_outputs.size());
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor gates = checked_gates(gates_, xs, n);
  std::vector<at::Tensor> grad_xs = empty_paths(x, grad_inputs ? m : 0);
  at::Tensor grad_gates = at::empty(gates.sizes(), gates.options());
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Weights<A> weights{data<A>(gates), batch_stride(gates), 1, static_cast<int>(n)};
    const Paths<T> to = outputs<T>(grad_xs);
    const at::Tensor products = inner_products<T>(xs, false, grad_outputs, weights, grad_inputs ? &to : nullptr, stream);
    // (slices, N, m, n), summed over slices; for gates (m, n) also over samples.
    const int64_t terms = gates.dim() == 2 ? products.size(0) * products.size(1) : products.size(0);
    const int64_t numbers = gates.numel();
    C10_CUDA_CHECK(outer_sums<A>(
        {{{data<A>(products), nullptr, 1, numbers, 1, grad_gates.mutable_data_ptr<A>()}}, 1}, terms, stream));
  });
  return {std::move(grad_xs), grad_gates};
}

}  // namespace
}  // namespace fastroute::cuda

TORCH_LIBRARY_IMPL(fastroute_native, CUDA, m) {
  m.impl("mix", &fastroute::cuda::mix);
  m.impl("mix_backward", &fastroute::cuda::mix_backward);
}
