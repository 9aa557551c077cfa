// From PyTorch's tensors to what the kernels take.

#pragma once

#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "paths.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace fastroute::cuda {

inline Shape shape_of(const at::Tensor& x) {
  const Geometry g(x);
  return {g.batch, g.channels, g.size, g.channels_last || g.size == 1};  // one pixel is both; columns are wider
}

template <typename T>
Paths<const T> inputs(at::TensorList tensors) {
  Paths<const T> paths;
  for (const auto& x : tensors) {
    paths.data[paths.count] = x.const_data_ptr<T>();
    paths.stride[paths.count++] = x.stride(0);
  }
  return paths;
}

template <typename T>
Paths<T> outputs(const std::vector<at::Tensor>& tensors) {
  Paths<T> paths;
  for (const auto& x : tensors) {
    paths.data[paths.count] = x.mutable_data_ptr<T>();
    paths.stride[paths.count++] = x.stride(0);
  }
  return paths;
}

// Of the current device.
const Device& device();

// inner_products, with the scratch that it needs: (slices, N, m, n).
template <typename T>
at::Tensor inner_products(
    at::TensorList xs, at::TensorList grad_outputs, const Weights<accumulate_t<T>>& weights, const Paths<T>* grad_xs,
    cudaStream_t stream) {
  const Shape shape = shape_of(xs[0]);
  // 4 blocks to a multiprocessor, each with at least 16 KB of every path: 4 vectors for each thread.
  const int64_t least = 16384 / sizeof(T);
  const int64_t slices = choose_slices(shape.samples, 4 * device().multiprocessors, shape.elements(), least);
  at::Tensor products = at::empty(
      {slices, shape.samples, static_cast<int64_t>(xs.size()), static_cast<int64_t>(grad_outputs.size())},
      xs[0].options().dtype(accumulate_type(xs[0].scalar_type())));
  C10_CUDA_CHECK(inner_products<T>(
      inputs<T>(xs), inputs<T>(grad_outputs), shape, slices, products.mutable_data_ptr<accumulate_t<T>>(), weights,
      grad_xs, stream));
  return products;
}

}  // namespace fastroute::cuda
