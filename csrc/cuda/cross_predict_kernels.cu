// The passes around the convolutions of cross-prediction. A joined tensor holds `parts` paths concatenated along its channels:
// in channels_last pixel by pixel, else one path after another.

#include "cuda/gate.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace fastroute::cuda {
namespace {

// Position of element `e` of the first part in a joined tensor; part p is p * run further.
struct Joined {
  int64_t run, parts;

  __device__ Joined(const Shape& shape, int64_t parts)
      : run(shape.channels_last ? shape.channels : shape.elements()), parts(parts) {}
  __device__ int64_t operator()(int64_t e) const {
    const Division at(e, run);
    return at.quotient * run * parts + at.remainder;
  }
};

template <typename T, int V, int TILE>
__global__ void __launch_bounds__(kThreads, 2) sum_predictions_kernel(
    const __grid_constant__ Paths<const T> predictions, const accumulate_t<T>* gates, const accumulate_t<T>* offsets,
    bool relu, const Shape shape, int64_t chunks, const __grid_constant__ Paths<T> outputs) {
  using A = accumulate_t<T>;
  __shared__ A w[kMaxPaths][TILE];  // [j][i]
  const int m = predictions.count, n = outputs.count;
  const Division at(blockIdx.x, chunks);
  const int64_t s = at.quotient, vectors = shape.elements() / V;
  for (int r = threadIdx.x; r < m * n; r += kThreads) w[r % n][r / n] = gates[s * m * n + r];
  __syncthreads();
  const Joined joined(shape, n);
  const int64_t begin = at.remainder * kThreads * kSteps, end = min(vectors, begin + kThreads * kSteps);
  for (int64_t v = begin + threadIdx.x; v < end; v += kThreads) {
    const int64_t from = joined(v * V);
    for (int j = 0; j < n; ++j) {
      A acc[V] = {};
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        if (i < m) {
          const auto u = load<T, V>(predictions.sample(i, s) + from + j * joined.run);
#pragma unroll
          for (int k = 0; k < V; ++k) acc[k] += w[j][i] * static_cast<A>(u.v[k]);
        }
      }
      if (offsets) add_shares(acc, offsets + (s * n + j) * shape.channels, shape, v * V);
#pragma unroll
      for (int k = 0; k < V; ++k) acc[k] = relu && acc[k] < 0 ? A(0) : acc[k];  // keeps NaN
      store<A, T, V>(outputs.sample(j, s) + v * V, acc);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) scale_paths_kernel(
    const __grid_constant__ Paths<const T> paths, const __grid_constant__ Paths<const T> masks,
    const accumulate_t<T>* weights, const Shape shape, int64_t chunks, const __grid_constant__ Paths<T> masked,
    const __grid_constant__ Paths<T> scaled) {
  using A = accumulate_t<T>;
  __shared__ A w[kMaxPaths * kMaxPaths];
  const int parts = paths.count, count = scaled.count;
  const Division at(blockIdx.x, chunks);
  const int64_t s = at.quotient, vectors = shape.elements() / V;
  for (int r = threadIdx.x; r < parts * count; r += kThreads) w[r] = weights[s * parts * count + r];
  __syncthreads();
  const Joined joined(shape, parts);
  const int64_t begin = at.remainder * kThreads * kSteps, end = min(vectors, begin + kThreads * kSteps);
  for (int64_t v = begin + threadIdx.x; v < end; v += kThreads) {
    const int64_t to = joined(v * V);
    for (int p = 0; p < parts; ++p) {
      const auto x = load<T, V>(paths.sample(p, s) + v * V);
      A kept[V];
#pragma unroll
      for (int k = 0; k < V; ++k) kept[k] = static_cast<A>(x.v[k]);
      if (masks.count) {
        const auto y = load<T, V>(masks.sample(p, s) + v * V);
#pragma unroll
        for (int k = 0; k < V; ++k) kept[k] = static_cast<A>(y.v[k]) <= 0 ? A(0) : kept[k];
      }
      if (masked.count) store<A, T, V>(masked.sample(p, s) + v * V, kept);
      for (int q = 0; q < count; ++q) {
        A out[V];
#pragma unroll
        for (int k = 0; k < V; ++k) out[k] = w[p * count + q] * kept[k];
        store<A, T, V>(scaled.sample(q, s) + to + p * joined.run, out);
      }
    }
  }
}

template <typename T, int V, int TILE>
__global__ void __launch_bounds__(kThreads, TILE == 8 ? 1 : 2) sum_gradients_kernel(
    const __grid_constant__ Paths<const T> terms, const __grid_constant__ Paths<const T> xs,
    const accumulate_t<T>* gates, const Shape shape, int64_t slices, accumulate_t<T>* products,
    const __grid_constant__ Paths<T> grad_xs) {
  using A = accumulate_t<T>;
  __shared__ A scratch[kWarps * TILE * TILE];
  __shared__ A w[TILE][TILE];
  const int m = xs.count, n = terms.count;
  const Division at(blockIdx.x, shape.samples);
  const int64_t slice = at.quotient, s = at.remainder, vectors = shape.elements() / V;
  for (int r = threadIdx.x; r < m * n; r += kThreads) w[r / n][r % n] = gates[s * m * n + r];
  __syncthreads();
  const Joined joined(shape, m);
  A acc[TILE][TILE] = {};
  const int64_t end = (slice + 1) * vectors / slices;
  for (int64_t v = slice * vectors / slices + threadIdx.x; v < end; v += kThreads) {
    const int64_t from = joined(v * V);
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
      if (i < m) {
        const auto x = load<T, V>(xs.sample(i, s) + v * V);
        A dx[V] = {};
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
          if (j < n) {
            const auto term = load<T, V>(terms.sample(j, s) + from + i * joined.run);
            A product = 0;
#pragma unroll
            for (int k = 0; k < V; ++k) {
              const A t = static_cast<A>(term.v[k]);
              product += static_cast<A>(x.v[k]) * t;
              dx[k] += w[i][j] * t;
            }
            acc[i][j] += product;
          }
        }
        if (grad_xs.count) store<A, T, V>(grad_xs.sample(i, s) + v * V, dx);
      }
    }
  }
  block_sums(acc, m, n, scratch, products + static_cast<int64_t>(blockIdx.x) * m * n);
}

// Returns whether vectors do not cross parts, in paths and joined tensors.
template <typename T, typename... P>
bool fits_parts(const Shape& shape, const P&... paths) {
  const int64_t run = shape.channels_last ? shape.channels : shape.elements();
  return run % kVector<T> == 0 && (fits_vectors(paths, run) && ...);
}

}  // namespace

template <typename T>
cudaError_t sum_predictions(
    const Paths<const T>& predictions, const accumulate_t<T>* gates, const accumulate_t<T>* offsets, bool relu,
    const Shape& shape, const Paths<T>& outputs, cudaStream_t stream) {
  return with_vector<T>(fits_parts<T>(shape, predictions, outputs), [&](auto v) {
    return with_tile(predictions.count, [&](auto tile) {
      const int64_t chunks = ceil_div(shape.elements() / v(), kThreads * kSteps);
      return launch(
          sum_predictions_kernel<T, v(), tile()>, shape.samples * chunks, kThreads, 0, 0, stream, predictions, gates,
          offsets, relu, shape, chunks, outputs);
    });
  });
}

template <typename T>
cudaError_t scale_paths(
    const Paths<const T>& paths, const Paths<const T>& masks, const accumulate_t<T>* weights, const Shape& shape,
    const Paths<T>& masked, const Paths<T>& scaled, cudaStream_t stream) {
  return with_vector<T>(fits_parts<T>(shape, paths, masks, masked, scaled), [&](auto v) {
    const int64_t chunks = ceil_div(shape.elements() / v(), kThreads * kSteps);
    return launch(
        scale_paths_kernel<T, v()>, shape.samples * chunks, kThreads, 0, 0, stream, paths, masks, weights, shape, chunks,
        masked, scaled);
  });
}

template <typename T>
cudaError_t sum_gradients(
    const Paths<const T>& terms, const Paths<const T>& xs, const accumulate_t<T>* gates, const Shape& shape,
    int64_t slices, accumulate_t<T>* products, const Paths<T>& grad_xs, cudaStream_t stream) {
  return with_vector<T>(fits_parts<T>(shape, terms, xs, grad_xs), [&](auto v) {
    return with_tile(xs.count > terms.count ? xs.count : terms.count, [&](auto tile) {
      return launch(
          sum_gradients_kernel<T, v(), tile()>, slices * shape.samples, kThreads, 0, 0, stream, terms, xs, gates, shape,
          slices, products, grad_xs);
    });
  });
}

#define INSTANTIATE(T)                                                                                            \
  template cudaError_t sum_predictions<T>(                                                                        \
      const Paths<const T>&, const accumulate_t<T>*, const accumulate_t<T>*, bool, const Shape&, const Paths<T>&, \
      cudaStream_t);                                                                                              \
  template cudaError_t scale_paths<T>(                                                                            \
      const Paths<const T>&, const Paths<const T>&, const accumulate_t<T>*, const Shape&, const Paths<T>&,        \
      const Paths<T>&, cudaStream_t);                                                                             \
  template cudaError_t sum_gradients<T>(                                                                          \
      const Paths<const T>&, const Paths<const T>&, const accumulate_t<T>*, const Shape&, int64_t,                \
      accumulate_t<T>*, const Paths<T>&, cudaStream_t);
FASTROUTE_FOR_TYPES(INSTANTIATE)

}  // namespace fastroute::cuda
