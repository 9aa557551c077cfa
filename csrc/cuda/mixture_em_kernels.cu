// The mixture-EM loss (Eq. 4.11 to 4.23) and its gradient: one launch each, with one block per mixture. A batch of scores is
// small, and each mixture's statistics need all of it, so a block rereads its columns from cache.

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sums.cuh"

#include <cfloat>

namespace fastroute::cuda {
namespace {

// out[j] = f(0, j) ∘ f(1, j) ∘ … by one block, in a fixed order, where ∘ is `combine`; scratch holds kThreads values. Ends with
// a barrier.
template <typename A, typename F, typename C>
__device__ void combine_samples(int64_t samples, int clusters, A* scratch, A* out, F f, C combine) {
  const int thread = threadIdx.x;
  for (int first = 0; first < clusters; first += kThreads) {
    const int width = min(clusters - first, kThreads), groups = kThreads / width, group = thread / width;
    const int j = first + thread % width;
    A value = 0;
    if (group < groups) {
      for (int64_t s = group; s < samples; s += groups) value = combine(value, f(s, j));
    }
    scratch[thread] = value;
    __syncthreads();
    int half = 1;
    while (half < groups) half *= 2;
    while (half /= 2) {
      if (group < half && group + half < groups) {
        scratch[thread] = combine(scratch[thread], scratch[thread + half * width]);
      }
      __syncthreads();
    }
    if (thread < width) out[j] = scratch[thread];
    __syncthreads();
  }
}

template <typename A, typename F>
__device__ void sums_over_samples(int64_t samples, int clusters, A* scratch, A* out, F f) {
  combine_samples(samples, clusters, scratch, out, f, [](A a, A b) { return a + b; });
}

// Exponent of a distance's power of two, clamped so that its inverse is a normal number too.
template <typename A>
__device__ int exponent_of(A distance) {
  constexpr int kLast = sizeof(A) == sizeof(float) ? FLT_MAX_EXP - 2 : DBL_MAX_EXP - 2;
  return distance > 0 ? max(-kLast, min(kLast, ilogb(distance))) : 0;
}

// 1/σ, or 0 if σ is 0 or so small that its inverse overflows.
template <typename A>
__device__ A inverse(A sigma) {
  const A scale = 1 / sigma;
  return isinf(scale) ? A(0) : scale;
}

// Reduces the values of `lanes` threads, a power of two up to 32, with f, into all of them. The whole warp must take part.
template <typename A, typename F>
__device__ A combine_lanes(A value, int lanes, F f) {
  for (int mask = lanes / 2; mask; mask /= 2) value = f(value, shuffle_xor(value, mask));
  return value;
}

template <typename A>
__device__ A log_sigmoid(A x) {
  return (x < 0 ? x : A(0)) - log1p(exp(x < 0 ? x : -x));
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) mixture_em_forward_kernel(const __grid_constant__ MixtureForward<T> args) {
  using A = accumulate_t<T>;
  const MixtureSizes& g = args.sizes;
  const int K = g.clusters, views = g.views;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * K, stride = g.stride();
  const A weight = static_cast<A>(g.weight()), over_gamma = static_cast<A>(args.over_gamma);
  A* const mu = static_cast<A*>(dynamic_shared());  // [2][K]
  A *const rho = mu + 2 * K, *const log_prior = rho + 2 * K, *const scratch = log_prior + K;  // [2][K], [K], [kThreads]
  const auto score = [&](int v, int64_t s, int j) { return static_cast<A>(args.scores[v][own + s * stride + j]); };

  for (int v = 0; v < views; ++v) {
    // Holds the largest distances until log π is written.
    A *const shift = mu + v * K, *const variance = rho + v * K, *const largest = log_prior;
    if (!args.mean) {
      // The sums are over distances to the first sample, so that a constant column has σ = 0 exactly. Distances are divided by
      // a power of two near the largest, so that no square over- or underflows.
      combine_samples(
          g.samples, K, scratch, largest, [&](int64_t s, int j) { return abs(score(v, s, j) - score(v, 0, j)); },
          [](A a, A b) { return b > a ? b : a; });
      const auto distance = [&](int64_t s, int j) {
        return (score(v, s, j) - score(v, 0, j)) * ldexp(A(1), -exponent_of(largest[j]));
      };
      sums_over_samples(g.samples, K, scratch, shift, distance);
      sums_over_samples(g.samples, K, scratch, variance, [&](int64_t s, int j) {
        const A d = distance(s, j) - weight * shift[j];
        return d * d;
      });
    }
    for (int j = threadIdx.x; j < K; j += kThreads) {
      if (args.mean) {
        mu[v * K + j] = args.mean[own + j];
        rho[v * K + j] = inverse(args.std[own + j]);
      } else {
        const int exponent = exponent_of(largest[j]);
        mu[v * K + j] = g.samples ? score(v, 0, j) + ldexp(weight * shift[j], exponent) : A(0);
        rho[v * K + j] = ldexp(inverse(sqrt(weight * variance[j])), -exponent);
        if (isinf(rho[v * K + j])) rho[v * K + j] = 0;
      }
      args.means[v * stride + own + j] = mu[v * K + j];
      args.scales[v * stride + own + j] = rho[v * K + j];
    }
  }
  for (int j = threadIdx.x; j < K; j += kThreads) {
    log_prior[j] = args.prior ? log(args.prior[own + j]) : A(0);
  }
  const A least = log(sizeof(A) == sizeof(float) ? A(FLT_MIN) : A(DBL_MIN));  // for log π in p log π, 0 with π
  __syncthreads();

  int lanes = 1;
  while (lanes < 32 && lanes < K) lanes *= 2;
  const int lane = threadIdx.x % lanes, rows = kThreads / lanes;
  const auto normalized = [&](int v, int64_t s, int j) { return (score(v, s, j) - mu[v * K + j]) * rho[v * K + j]; };
  A total = 0;
  for (int64_t first = 0; first < g.samples; first += rows) {
    const int64_t s = first + threadIdx.x / lanes;
    A* const p = args.posterior + own + s * stride;
    const int begin = s < g.samples ? lane : K;  // threads past the samples only take part in the reductions
    A top = -INFINITY, sum = 0;
    for (int j = begin; j < K; j += lanes) {
      const A logit = normalized(0, s, j) + log_prior[j];
      top = logit > top ? logit : top;
    }
    top = combine_lanes(top, lanes, [](A a, A b) { return a > b ? a : b; });
    for (int j = begin; j < K; j += lanes) sum += p[j] = exp(normalized(0, s, j) + log_prior[j] - top);
    sum = combine_lanes(sum, lanes, [](A a, A b) { return a + b; });
    for (int j = begin; j < K; j += lanes) {
      p[j] /= sum;  // Eq. 4.18, 4.20
      for (int v = 0; v < views; ++v) {
        total += p[j] * (fmax(log_prior[j], least) + log_sigmoid(normalized(v, s, j) * over_gamma));  // Eq. 4.21, 4.23
      }
    }
  }
  total = warp_sum(total);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp];
    args.loss[blockIdx.x] = -weight * total;  // Eq. 4.22
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    mixture_em_backward_kernel(const __grid_constant__ MixtureBackward<T> args) {
  using A = accumulate_t<T>;
  const MixtureSizes& g = args.sizes;
  const int K = g.clusters, views = g.views;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * K, stride = g.stride();
  const A weight = static_cast<A>(g.weight()), over_gamma = static_cast<A>(args.over_gamma);
  const A factor = -args.grad_loss[blockIdx.x] * weight * over_gamma;
  A* const along_one = static_cast<A*>(dynamic_shared());
  A *const along_a = along_one + K, *const scratch = along_a + K;
  for (int v = 0; v < views; ++v) {
    const A *mu = args.means + v * stride + own, *rho = args.scales + v * stride + own;
    const auto normalized = [&](int64_t s, int j) {
      return (static_cast<A>(args.scores[v][own + s * stride + j]) - mu[j]) * rho[j];
    };
    // dL/da* = −p sigmoid(−a*/γ) / (N γ), with p constant.
    const auto inner = [&](int64_t s, int j, A a) {
      return factor * args.posterior[own + s * stride + j] / (1 + exp(a * over_gamma));
    };
    if (args.batch_statistics) {  // through μ and σ: remove these components from each column
      sums_over_samples(g.samples, K, scratch, along_one, [&](int64_t s, int j) { return inner(s, j, normalized(s, j)); });
      sums_over_samples(g.samples, K, scratch, along_a, [&](int64_t s, int j) {
        const A a = normalized(s, j);
        return a * inner(s, j, a);
      });
    }
    for (int64_t e = threadIdx.x; e < g.samples * K; e += kThreads) {
      const Division at(e, K);
      const int64_t s = at.quotient;
      const int j = static_cast<int>(at.remainder);
      const A a = normalized(s, j);
      A d = inner(s, j, a);
      if (args.batch_statistics) d = d - weight * along_one[j] - a * (weight * along_a[j]);
      args.grads[v][own + s * stride + j] = static_cast<T>(d * rho[j]);
    }
    __syncthreads();
  }
}

// Shared memory for a number of values per cluster and one per thread.
template <typename A>
int64_t shared_bytes(int64_t numbers, int64_t clusters) {
  return ceil_div((numbers * clusters + kThreads) * sizeof(A), 16) * 16;
}

}  // namespace

template <typename T>
cudaError_t mixture_em_forward(const MixtureForward<T>& args, cudaStream_t stream) {
  const int64_t shared = shared_bytes<accumulate_t<T>>(5, args.sizes.clusters);
  return launch(mixture_em_forward_kernel<T>, args.sizes.mixtures, kThreads, shared, 0, stream, args);
}

template <typename T>
cudaError_t mixture_em_backward(const MixtureBackward<T>& args, cudaStream_t stream) {
  const int64_t shared = shared_bytes<accumulate_t<T>>(2, args.sizes.clusters);
  return launch(mixture_em_backward_kernel<T>, args.sizes.mixtures, kThreads, shared, 0, stream, args);
}

#define INSTANTIATE(T)                                                            \
  template cudaError_t mixture_em_forward<T>(const MixtureForward<T>&, cudaStream_t); \
  template cudaError_t mixture_em_backward<T>(const MixtureBackward<T>&, cudaStream_t);
FASTROUTE_FOR_TYPES(INSTANTIATE)

}  // namespace fastroute::cuda
