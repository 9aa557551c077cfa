// Conversion of PyTorch's tensors to the kernels' arguments.

#pragma once

#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "paths.h"

#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace fastroute::cuda {

inline Shape shape_of(const at::Tensor& x) {
  const Geometry g(x);
  return {g.batch, g.channels, g.size, g.channels_last || g.size == 1};  // one pixel is both; columns are wider
}

template <typename T>
Paths<const T> inputs(at::TensorList tensors, bool relu = false) {
  Paths<const T> paths;
  paths.relu = relu;
  for (const auto& x : tensors) {
    paths.data[paths.count] = x.const_data_ptr<T>();
    paths.stride[paths.count++] = x.stride(0);
  }
  return paths;
}

template <typename T>
Paths<T> outputs(at::TensorList tensors) {
  Paths<T> paths;
  for (const auto& x : tensors) {
    paths.data[paths.count] = x.mutable_data_ptr<T>();
    paths.stride[paths.count++] = x.stride(0);
  }
  return paths;
}

template <typename A>
Gate<A> gate_of(const Parameters& p) {
  return {data<A>(p.w1), data<A>(p.b1), data<A>(p.w2), data<A>(p.b2), static_cast<int>(p.m), static_cast<int>(p.n),
          p.channels, p.hidden};
}

// The gradients of a gate's parameters.
struct ParameterGradients {
  const Parameters& p;
  at::Tensor w1, b1, w2, b2;

  explicit ParameterGradients(const Parameters& parameters) : p(parameters) {
    const auto options = p.w2.options();
    w1 = p.hidden ? at::empty_like(p.w1) : at::empty({0}, options);
    b1 = p.hidden ? at::empty({p.m, p.hidden}, options) : at::empty({0}, options);
    w2 = at::empty_like(p.w2);
    b2 = at::empty({p.m, p.n}, options);
  }

  // From d_scores (N, m, n), d_hidden (N, m, G), pooled (N, m, C) and hidden (N, m, G), all contiguous.
  template <typename A>
  void compute(
      const at::Tensor& d_scores, const at::Tensor& d_hidden, const at::Tensor& pooled, const at::Tensor& hidden,
      cudaStream_t stream) {
    const auto out = [](at::Tensor& t) { return t.mutable_data_ptr<A>(); };
    const at::Tensor& below = p.hidden ? hidden : pooled;
    C10_CUDA_CHECK(outer_sums<A>(
        {{{data<A>(d_scores), data<A>(below), p.m, p.n, below.size(2), out(w2)},
          {data<A>(d_scores), nullptr, p.m, p.n, 1, out(b2)},
          {data<A>(d_hidden), data<A>(pooled), p.m, p.hidden, p.channels, out(w1)},
          {data<A>(d_hidden), nullptr, p.m, p.hidden, 1, out(b1)}},
         p.hidden ? 4 : 2},
        pooled.size(0), stream));
  }
};

// `pool` with its scratch (slices, N, m, C).
template <typename T>
at::Tensor sums_over_space(
    const Paths<const T>& xs, const Shape& shape, const at::TensorOptions& options, cudaStream_t stream) {
  // 32 warps per multiprocessor, each with at least 4 vectors per lane; or 4 blocks, each with at least 64 pixels.
  const int64_t paths = shape.samples * xs.count, multiprocessors = device().multiprocessors;
  const int64_t slices = shape.channels_last
      ? choose_slices(paths, 4 * multiprocessors, shape.space, 64)
      : choose_slices(paths * shape.channels, 32 * multiprocessors, shape.space, 128 * kVector<T>);
  at::Tensor sums = at::empty({slices, shape.samples, xs.count, shape.channels}, options);
  C10_CUDA_CHECK(pool<T>(xs, shape, slices, sums.mutable_data_ptr<accumulate_t<T>>(), stream));
  return sums;
}

// Slices of a sample for inner products: 4 blocks per multiprocessor, each with at least 16 KB of every path, 4 vectors per
// thread.
template <typename T>
int64_t product_slices(const Shape& shape) {
  return choose_slices(shape.samples, 4 * device().multiprocessors, shape.elements(), 16384 / sizeof(T));
}

// inner_products with its scratch (slices, N, m, n).
template <typename T>
at::Tensor inner_products(
    at::TensorList xs, bool relu, at::TensorList grad_outputs, const Weights<accumulate_t<T>>& weights,
    const Paths<T>* grad_xs, cudaStream_t stream) {
  const Shape shape = shape_of(xs[0]);
  const int64_t slices = product_slices<T>(shape);
  at::Tensor products = at::empty(
      {slices, shape.samples, static_cast<int64_t>(xs.size()), static_cast<int64_t>(grad_outputs.size())},
      xs[0].options().dtype(accumulate_type(xs[0].scalar_type())));
  C10_CUDA_CHECK(inner_products<T>(
      inputs<T>(xs, relu), inputs<T>(grad_outputs), shape, slices, products.mutable_data_ptr<accumulate_t<T>>(), weights,
      grad_xs, stream));
  return products;
}

}  // namespace fastroute::cuda
