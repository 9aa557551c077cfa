// First pass of the backward: dG_ij = <dY_j, X_i> (Eq. 3.10), as sums over slices of each sample.

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sums.cuh"

namespace fastroute::cuda {
namespace {

template <typename T, int V, int TILE, bool MIXES>
__global__ void __launch_bounds__(kThreads, TILE == 8 ? 1 : 2) inner_products_kernel(
    const __grid_constant__ Paths<const T> xs, const __grid_constant__ Paths<const T> grad_outputs, const Shape shape,
    int64_t slices, accumulate_t<T>* products, const Weights<accumulate_t<T>> weights,
    const __grid_constant__ Paths<T> grad_xs) {
  using A = accumulate_t<T>;
  __shared__ A scratch[kWarps * TILE * TILE];
  __shared__ A w[TILE][TILE];
  const int m = xs.count, n = grad_outputs.count;
  const Division at(blockIdx.x, shape.samples);
  const int64_t slice = at.quotient, s = at.remainder, vectors = shape.elements() / V;
  for (int r = threadIdx.x; MIXES && r < m * n; r += kThreads) {
    const int i = r / n, j = r % n;
    w[i][j] = weights.data[s * weights.batch + i * weights.to + j * weights.from];
  }
  __syncthreads();

  A acc[TILE][TILE] = {};
  const int64_t end = (slice + 1) * vectors / slices;
  for (int64_t v = slice * vectors / slices + threadIdx.x; v < end; v += kThreads) {
    Vec<T, V> dy[TILE];
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      if (j < n) dy[j] = load<T, V>(grad_outputs.sample(j, s) + v * V);
    }
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      if (i < m) {
        auto x = load<T, V>(xs.sample(i, s) + v * V);
        rectify(x, xs.relu);
        A dx[V] = {};
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
          if (j < n) {
            const A weight = MIXES ? w[i][j] : A(0);
            A product = 0;
#pragma unroll
            for (int k = 0; k < V; ++k) {
              const A d = static_cast<A>(dy[j].v[k]);
              product += static_cast<A>(x.v[k]) * d;
              if constexpr (MIXES) dx[k] += weight * d;
            }
            acc[i][j] += product;
          }
        }
        if constexpr (MIXES) store<A, T, V>(grad_xs.sample(i, s) + v * V, dx);
      }
    }
  }
  block_sums(acc, m, n, scratch, products + static_cast<int64_t>(blockIdx.x) * m * n);
}

}  // namespace

template <typename T>
cudaError_t inner_products(
    const Paths<const T>& xs, const Paths<const T>& grad_outputs, const Shape& shape, int64_t slices,
    accumulate_t<T>* products, const Weights<accumulate_t<T>>& weights, const Paths<T>* grad_xs, cudaStream_t stream) {
  const Paths<T> to = grad_xs ? *grad_xs : Paths<T>();
  const int64_t elements = shape.elements();
  const bool fits = fits_vectors(xs, elements) && fits_vectors(grad_outputs, elements) && fits_vectors(to, elements);
  return with_vector<T>(fits, [&](auto v) {
    return with_tile(xs.count > grad_outputs.count ? xs.count : grad_outputs.count, [&](auto tile) {
      const auto kernel =
          grad_xs ? inner_products_kernel<T, v(), tile(), true> : inner_products_kernel<T, v(), tile(), false>;
      return launch(
          kernel, slices * shape.samples, kThreads, 0, 0, stream, xs, grad_outputs, shape, slices, products, weights,
          to);
    });
  });
}

#define INSTANTIATE(T)                                                                                              \
  template cudaError_t inner_products<T>(                                                                           \
      const Paths<const T>&, const Paths<const T>&, const Shape&, int64_t, accumulate_t<T>*, const Weights<accumulate_t<T>>&, \
      const Paths<T>*, cudaStream_t);
FASTROUTE_FOR_TYPES(INSTANTIATE)

}  // namespace fastroute::cuda
