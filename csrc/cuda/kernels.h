// The launches. Each template is instantiated in the .cu file named with it, for the four element types T or for their
// accumulation types A. No launch synchronises, so all can be captured in a CUDA graph.

#pragma once

#include "cuda/plan.h"
#include "cuda/types.h"

namespace fastroute::cuda {

// pool.cu: sums[slice][s][i][c] = Σ of channel c of X_i over one of `slices` parts of the space (Eq. 3.3).
template <typename T>
cudaError_t pool(
    const Paths<const T>& xs, const Shape& shape, int64_t slices, accumulate_t<T>* sums, cudaStream_t stream);

// weighted_sums.cu: to_b = Σ_a weights[s * batch + a * from + b * to] from_a + shares[s][b][channel] (Eq. 3.7, 3.15),
// zero unless masks_b > 0. `masks` may have no paths.
template <typename A>
struct Weights {
  const A* data;
  int64_t batch;
  int from, to;
};

template <typename T>
cudaError_t weighted_sums(
    const Paths<const T>& from, const Weights<accumulate_t<T>>& weights, const accumulate_t<T>* shares,
    const Shape& shape, const Paths<const T>& masks, const Paths<T>& to, cudaStream_t stream);

// inner_products.cu: products[slice][s][i][j] = <dY_j, X_i> over one of `slices` parts of the sample (Eq. 3.10). With
// grad_xs, in the same read, dX_i = Σ_j weights dY_j: all of dX if the gates do not depend on X.
template <typename T>
cudaError_t inner_products(
    const Paths<const T>& xs, const Paths<const T>& grad_outputs, const Shape& shape, int64_t slices,
    accumulate_t<T>* products, const Weights<accumulate_t<T>>& weights, const Paths<T>* grad_xs, cudaStream_t stream);

// gates.cu: Z, H, A and G of every sample from the result of `pool`.
template <typename A>
cudaError_t gates_forward(
    const Gate<A>& gate, const Shape& shape, int64_t slices, const A* sums, A* pooled, A* hidden, A* scores, A* gates,
    cudaStream_t stream);

// gates.cu: dA, dH and shares of every sample from the result of `inner_products`. Absent gradients and shares are null.
template <typename A>
cudaError_t gates_backward(
    const Gate<A>& gate, const Shape& shape, int64_t slices, const A* products, const A* grad_gates,
    const A* grad_scores, const A* gates, const A* hidden, A* d_scores, A* d_hidden, A* shares, cudaStream_t stream);

// gates.cu: out[i][r][k] = Σ_s left[s][i][r] right[s][i][k], samples in a fixed order (Eq. 3.14). Where right is null
// it stands for ones, and columns must be 1. Up to four of these in one launch.
template <typename A>
struct OuterSum {
  const A *left, *right;
  int64_t m, rows, columns;
  A* out;
};

template <typename A>
struct OuterSums {
  OuterSum<A> jobs[4];
  int count;
};

template <typename A>
cudaError_t outer_sums(const OuterSums<A>& sums, int64_t samples, cudaStream_t stream);

// mixture_em_kernels.cu: the mixture-EM loss of scores (N, m, K), up to 1024 clusters, and its gradient. Absent tensors are
// null.
struct MixtureSizes {
  int64_t samples;
  int mixtures, clusters, views;  // views: original scores, or these and augmented ones

  __host__ __device__ int64_t stride() const { return static_cast<int64_t>(mixtures) * clusters; }
  __host__ __device__ double weight() const { return 1.0 / static_cast<double>(samples ? samples : 1); }
};

template <typename T>
struct MixtureForward {
  const T* scores[2];
  const accumulate_t<T> *prior, *mean, *std;
  MixtureSizes sizes;
  double over_gamma;
  accumulate_t<T> *loss, *posterior, *means, *scales;
};

template <typename T>
struct MixtureBackward {
  const T* scores[2];
  const accumulate_t<T> *posterior, *means, *scales, *grad_loss;
  MixtureSizes sizes;
  double over_gamma;
  bool batch_statistics;
  T* grads[2];
};

template <typename T>
cudaError_t mixture_em_forward(const MixtureForward<T>& args, cudaStream_t stream);

template <typename T>
cudaError_t mixture_em_backward(const MixtureBackward<T>& args, cudaStream_t stream);

// cross_predict_kernels.cu: out_j = Σ_i gates[s][i][j] predictions_i[part j] + offsets[s][j][channel], at least 0 with relu.
template <typename T>
cudaError_t sum_predictions(
    const Paths<const T>& predictions, const accumulate_t<T>* gates, const accumulate_t<T>* offsets, bool relu,
    const Shape& shape, const Paths<T>& outputs, cudaStream_t stream);

// cross_predict_kernels.cu: masked_p = paths_p where masks_p > 0, or paths_p without masks, and scaled_q[part p] =
// weights[s][p][q] masked_p. `masked` may have no paths.
template <typename T>
cudaError_t scale_paths(
    const Paths<const T>& paths, const Paths<const T>& masks, const accumulate_t<T>* weights, const Shape& shape,
    const Paths<T>& masked, const Paths<T>& scaled, cudaStream_t stream);

// cross_predict_kernels.cu: products[slice][s][i][j] = <terms_j[part i], X_i> over one of `slices` parts of the sample, and
// dX_i = Σ_j gates[s][i][j] terms_j[part i]. `grad_xs` may have no paths.
template <typename T>
cudaError_t sum_gradients(
    const Paths<const T>& terms, const Paths<const T>& xs, const accumulate_t<T>* gates, const Shape& shape,
    int64_t slices, accumulate_t<T>* products, const Paths<T>& grad_xs, cudaStream_t stream);

// cluster.cu: the whole forward, or the backward up to dA and dH, with one cluster of blocks per sample, which is held in their
// shared memory. T is not double. `fits_vectors` must be true for all paths.
template <typename T>
struct ClusterForward {
  Paths<const T> xs;
  Paths<T> outputs;
  Shape shape;
  Gate<float> gate;
  float *pooled, *hidden, *scores, *gates;
  bool holds_gate = false;  // set by the launch, as is the number of clusters, which take the samples in turns
  int64_t clusters = 0;
};

template <typename T>
struct ClusterBackward {
  Paths<const T> xs, grad_outputs;
  Paths<T> grad_xs;
  Shape shape;
  Gate<float> gate;
  const float *grad_gates, *grad_scores, *gates, *hidden;
  float *d_scores, *d_hidden;
  bool holds_gate = false;  // set by the launch, as is the number of clusters, which take the samples in turns
  int64_t clusters = 0;
};

template <typename T>
cudaError_t cluster_forward(ClusterForward<T> args, int cluster, cudaStream_t stream);

template <typename T>
cudaError_t cluster_backward(ClusterBackward<T> args, int cluster, cudaStream_t stream);

// The architecture for which the kernel code that this device runs was compiled: 90 for sm_90. Below 90, which a newer device
// also runs if nothing better was built, these kernels are empty.
cudaError_t code_architecture(int* architecture);

// Returns whether every sample of the paths can be accessed 16 bytes at a time.
template <typename T>
bool fits_vectors(const Paths<T>& paths, int64_t elements) {
  bool fits = elements % kVector<std::remove_const_t<T>> == 0;
  for (int i = 0; i < paths.count; ++i) {
    fits = fits && reinterpret_cast<uintptr_t>(paths.data[i]) % 16 == 0 && paths.stride[i] * sizeof(T) % 16 == 0;
  }
  return fits;
}

}  // namespace fastroute::cuda
