// Second pass of forward and backward: every output is a weighted sum of the inputs (Eq. 3.7, 3.15).

#include "cuda/gate.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace fastroute::cuda {
namespace {

template <typename T, int V, int TILE>
__global__ void __launch_bounds__(kThreads, 2) weighted_sums_kernel(
    const __grid_constant__ Paths<const T> from, const Weights<accumulate_t<T>> weights,
    const accumulate_t<T>* shares, const Shape shape, int64_t chunks, const __grid_constant__ Paths<const T> masks,
    const __grid_constant__ Paths<T> to) {
  using A = accumulate_t<T>;
  __shared__ A w[kMaxPaths][TILE];  // [to][from]
  const Division at(blockIdx.x, chunks);
  const int64_t s = at.quotient, chunk = at.remainder, vectors = shape.elements() / V;
  for (int r = threadIdx.x; r < to.count * from.count; r += kThreads) {
    const int b = r / from.count, a = r % from.count;
    w[b][a] = weights.data[s * weights.batch + a * weights.from + b * weights.to];
  }
  __syncthreads();
  const int64_t begin = chunk * kThreads * kSteps, end = min(vectors, begin + kThreads * kSteps);
  for (int64_t v = begin + threadIdx.x; v < end; v += kThreads) {
    Vec<T, V> x[TILE];
#pragma unroll
    for (int a = 0; a < TILE; ++a) {
      if (a < from.count) x[a] = load<T, V>(from.sample(a, s) + v * V);
    }
    if (from.relu) {
#pragma unroll
      for (int a = 0; a < TILE; ++a) {
        if (a < from.count) rectify(x[a], true);
      }
    }
    for (int b = 0; b < to.count; ++b) {
      A acc[V] = {};
#pragma unroll
      for (int a = 0; a < TILE; ++a) {
        if (a < from.count) {
#pragma unroll
          for (int k = 0; k < V; ++k) acc[k] += w[b][a] * static_cast<A>(x[a].v[k]);
        }
      }
      if (shares) add_shares(acc, shares + (s * to.count + b) * shape.channels, shape, v * V);
      if (masks.count) keep_where_positive(acc, load<T, V>(masks.sample(b, s) + v * V));
      store<A, T, V>(to.sample(b, s) + v * V, acc);
    }
  }
}

}  // namespace

template <typename T>
cudaError_t weighted_sums(
    const Paths<const T>& from, const Weights<accumulate_t<T>>& weights, const accumulate_t<T>* shares,
    const Shape& shape, const Paths<const T>& masks, const Paths<T>& to, cudaStream_t stream) {
  const int64_t elements = shape.elements();
  const bool fits = fits_vectors(from, elements) && fits_vectors(masks, elements) && fits_vectors(to, elements);
  return with_vector<T>(fits, [&](auto v) {
    return with_tile(from.count, [&](auto tile) {
      const int64_t chunks = ceil_div(elements / v(), kThreads * kSteps);
      return launch(
          weighted_sums_kernel<T, v(), tile()>, shape.samples * chunks, kThreads, 0, 0, stream, from, weights, shares, shape,
          chunks, masks, to);
    });
  });
}

#define INSTANTIATE(T)                                                                                         \
  template cudaError_t weighted_sums<T>(                                                                                 \
      const Paths<const T>&, const Weights<accumulate_t<T>>&, const accumulate_t<T>*, const Shape&,              \
      const Paths<const T>&, const Paths<T>&, cudaStream_t);
FASTROUTE_FOR_TYPES(INSTANTIATE)

}  // namespace fastroute::cuda
