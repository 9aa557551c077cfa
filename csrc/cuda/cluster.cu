// One-read kernels for sm_90 and later: a cluster of blocks to a sample, each block with its share of the sample's paths
// in shared memory, the sums exchanged through distributed shared memory. X is read once in the forward; dY and X once
// in the backward.

#include "cuda/gate.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace fastroute::cuda {
namespace {

// A block's share of a sample: the same part [first, first + vectors) of every path, in vectors of 16 bytes.
struct Share {
  int64_t first;
  int vectors;
};

template <typename T>
__host__ __device__ int64_t share_size(const Shape& shape, int cluster) {
  return ceil_div(shape.elements() / kVector<T>, cluster);
}

#if FASTROUTE_CLUSTERS

template <typename T>
__device__ Share own_share(const Shape& shape) {
  const int64_t vectors = shape.elements() / kVector<T>, size = share_size<T>(shape, cluster_size());
  const int64_t first = min(size * cluster_rank(), vectors);
  return {first, static_cast<int>(min(size, vectors - first))};
}

// Takes arrays one after another off the block's shared memory.
struct Carve {
  char* at;

  template <typename A>
  __device__ A* take(int64_t count) {
    A* array = reinterpret_cast<A*>(at);
    at += ceil_div(count * sizeof(A), 16) * 16;
    return array;
  }
};

// Begins to copy the share of every path to held[path * size + v]. A thread copies the vectors v ≡ its index, and may
// read these after `copies_wait`; others only after a barrier.
template <typename T>
__device__ void hold(const Paths<const T>& paths, int64_t s, const Share& share, int64_t size, uint4* held) {
  for (int p = 0; p < paths.count; ++p) {
    const T* from = paths.sample(p, s) + share.first * kVector<T>;
#pragma unroll 4
    for (int v = threadIdx.x; v < share.vectors; v += kThreads) {
      copy_async(held + p * size + v, from + v * kVector<T>);
    }
  }
}

// max(x, 0) of what the calling thread has copied.
template <typename T>
__device__ void rectify_held(int paths, const Share& share, int64_t size, uint4* held) {
  for (int p = 0; p < paths; ++p) {
    for (int v = threadIdx.x; v < share.vectors; v += kThreads) {
      rectify(*reinterpret_cast<Vec<T, kVector<T>>*>(held + p * size + v), true);
    }
  }
}

// to_b = Σ_a weights[a * from_step + b * to_step] held_a + shares[b][channel] on the share (Eq. 3.7, 3.15), zero where
// masks_b is not above zero if there are masks.
template <typename T>
__device__ void mix_held(
    const uint4* held, int64_t size, const Share& share, int from, const float* weights, int from_step, int to_step,
    const float* shares, const Shape& shape, const Paths<const T>* masks, const Paths<T>& to, int64_t s) {
  constexpr int V = kVector<T>;
  for (int v = threadIdx.x; v < share.vectors; v += kThreads) {
    const int64_t element = (share.first + v) * V;
    for (int b = 0; b < to.count; ++b) {
      float acc[V] = {};
#pragma unroll 2
      for (int a = 0; a < from; ++a) {
        const auto x = load<T, V>(reinterpret_cast<const T*>(held + a * size + v));
        const float weight = weights[a * from_step + b * to_step];
#pragma unroll
        for (int k = 0; k < V; ++k) acc[k] += weight * static_cast<float>(x.v[k]);
      }
      if (shares) add_shares(acc, shares + b * shape.channels, shape, element);
      if (masks) keep_where_positive(acc, load<T, V>(masks->sample(b, s) + element));
      store<float, T, V>(to.sample(b, s) + element, acc);
    }
  }
}

// sums[i][c] over the held share.
template <typename T, int V>
__device__ void pool_held(
    const uint4* held, int64_t size, const Share& share, int m, const Shape& shape, float* scratch, float* sums) {
  const int64_t begin = share.first * kVector<T>, end = begin + share.vectors * kVector<T>;
  const auto path = [&](int64_t i) { return reinterpret_cast<const T*>(held + i * size); };
  if (shape.channels_last) {
    for (int i = 0; i < m; ++i) {
      column_sums<T, V>(path(i), begin, end, shape.channels, false, scratch, sums + i * shape.channels);
    }
  } else {
    for (int64_t r = threadIdx.x / 32; r < m * shape.channels; r += kWarps) {
      const Division at(r, shape.channels);
      const int64_t row = at.remainder * shape.space;
      const float sum =
          row_sum<T, V, float>(path(at.quotient), max(row, begin) - begin, min(row + shape.space, end) - begin, false);
      if (threadIdx.x % 32 == 0) sums[r] = sum;
    }
  }
}

template <typename A>
__device__ void copy(const A* from, int64_t count, A* to) {
  for (int64_t r = threadIdx.x; r < count; r += kThreads) to[r] = from[r];
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
cluster_forward_kernel(const __grid_constant__ ClusterForward<T> args) {
#if FASTROUTE_CLUSTERS
  constexpr int V = kVector<T>;
  const Shape& shape = args.shape;
  const auto& gate = args.gate;
  const int64_t s = blockIdx.x / cluster_size(), size = share_size<T>(shape, cluster_size());
  const int64_t mc = gate.m * shape.channels, mg = gate.m * gate.hidden, mn = gate.m * gate.n;
  const Share share = own_share<T>(shape);

  Carve memory{static_cast<char*>(dynamic_shared())};
  uint4* held = memory.take<uint4>(gate.m * size);
  float* part = memory.take<float>(mc);
  float* pooled = memory.take<float>(mc);
  float* hidden = memory.take<float>(mg);
  float* scores = memory.take<float>(mn);
  float* gates = memory.take<float>(mn);
  float* scratch = memory.take<float>(shape.channels_last ? kThreads * V : 0);

  hold(args.xs, s, share, size, held);
  copies_wait();
  if (args.xs.relu) rectify_held<T>(gate.m, share, size, held);
  __syncthreads();
  const int64_t unit = shape.channels_last ? shape.channels : shape.space;
  if (unit % V == 0) {
    pool_held<T, V>(held, size, share, gate.m, shape, scratch, part);
  } else {
    pool_held<T, 1>(held, size, share, gate.m, shape, scratch, part);
  }
  cluster_arrive();
  cluster_wait();
  for (int64_t r = threadIdx.x; r < mc; r += kThreads) {
    float sum = 0;
    for (int rank = 0; rank < cluster_size(); ++rank) sum += of_rank(part, rank)[r];
    pooled[r] = sum / static_cast<float>(shape.space);  // Eq. 3.3
  }
  cluster_arrive();  // `part` of the others has been read; they may not leave before
  __syncthreads();
  gate_forward(gate, pooled, hidden, scores, gates);
  if (cluster_rank() == 0) {
    copy(pooled, mc, args.pooled + s * mc);
    copy(hidden, mg, args.hidden + s * mg);
    copy(scores, mn, args.scores + s * mn);
    copy(gates, mn, args.gates + s * mn);
  }
  mix_held<T>(held, size, share, gate.m, gates, gate.n, 1, nullptr, shape, nullptr, args.outputs, s);
  cluster_wait();
#endif
}

template <typename T, int TILE>
__global__ void __launch_bounds__(kThreads, TILE == 8 ? 1 : 2)
cluster_backward_kernel(const __grid_constant__ ClusterBackward<T> args) {
#if FASTROUTE_CLUSTERS
  constexpr int V = kVector<T>, kSteps = 8 / TILE;  // 8 vectors of X on their way to each thread
  const Shape& shape = args.shape;
  const auto& gate = args.gate;
  const int m = gate.m, n = gate.n, mn = m * n;
  const int64_t s = blockIdx.x / cluster_size(), size = share_size<T>(shape, cluster_size());
  const int64_t mc = m * shape.channels, mg = m * gate.hidden;
  const Share share = own_share<T>(shape);

  Carve memory{static_cast<char*>(dynamic_shared())};
  uint4* held = memory.take<uint4>(n * size);
  float* scratch = memory.take<float>(kWarps * mn);
  float* part = memory.take<float>(mn);
  float* gates = memory.take<float>(mn);
  float* d_gates = memory.take<float>(mn);
  float* d_scores = memory.take<float>(mn);
  float* d_hidden = memory.take<float>(mg);
  float* shares = memory.take<float>(mc);

  hold(args.grad_outputs, s, share, size, held);
  copy(args.gates + s * mn, mn, gates);
  copies_wait();
  float acc[TILE][TILE] = {};
  for (int first = threadIdx.x; first < share.vectors; first += kSteps * kThreads) {
    Vec<T, V> x[kSteps][TILE];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int v = first + step * kThreads;
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        if (i < m && v < share.vectors) x[step][i] = load<T, V>(args.xs.sample(i, s) + (share.first + v) * V);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int v = first + step * kThreads;
      if (v < share.vectors) {
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
          if (i < m) rectify(x[step][i], args.xs.relu);
        }
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
          if (j < n) {
            const auto dy = load<T, V>(reinterpret_cast<const T*>(held + j * size + v));
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
              if (i < m) {
#pragma unroll
                for (int k = 0; k < V; ++k) {
                  acc[i][j] += static_cast<float>(x[step][i].v[k]) * static_cast<float>(dy.v[k]);
                }
              }
            }
          }
        }
      }
    }
  }
  block_sums(acc, m, n, scratch, part);
  cluster_arrive();
  cluster_wait();
  for (int r = threadIdx.x; r < mn; r += kThreads) {
    float sum = 0;
    for (int rank = 0; rank < cluster_size(); ++rank) sum += of_rank(part, rank)[r];
    d_gates[r] = sum + (args.grad_gates ? args.grad_gates[s * mn + r] : 0.0f);  // Eq. 3.10
  }
  cluster_arrive();  // `part` of the others has been read; they may not leave before
  __syncthreads();
  gate_backward(
      gate, shape.space, gates, args.hidden + s * mg, d_gates, args.grad_scores ? args.grad_scores + s * mn : nullptr,
      d_scores, d_hidden, shares);
  if (cluster_rank() == 0) {
    copy(d_scores, mn, args.d_scores + s * mn);
    copy(d_hidden, mg, args.d_hidden + s * mg);
  }
  mix_held(held, size, share, n, gates, 1, n, shares, shape, args.xs.relu ? &args.xs : nullptr, args.grad_xs, s);
  cluster_wait();
#endif
}

int64_t bytes(int64_t floats) { return ceil_div(floats * sizeof(float), 16) * 16; }

}  // namespace

cudaError_t code_architecture(int* architecture) {
  cudaFuncAttributes attributes;
  const auto error = cudaFuncGetAttributes(&attributes, cluster_forward_kernel<float>);
  *architecture = attributes.ptxVersion;
  return error;
}

int64_t cluster_forward_extra(const Shape& shape, int64_t m, int64_t n, int64_t hidden, int64_t vector) {
  return 2 * bytes(m * shape.channels) + bytes(m * hidden) + 2 * bytes(m * n) +
      (shape.channels_last ? bytes(kThreads * vector) : 0);
}

int64_t cluster_backward_extra(const Shape& shape, int64_t m, int64_t n, int64_t hidden) {
  return bytes(kWarps * m * n) + 4 * bytes(m * n) + bytes(m * hidden) + bytes(m * shape.channels);
}

template <typename T>
cudaError_t cluster_forward(const ClusterForward<T>& args, int cluster, cudaStream_t stream) {
  const int m = args.gate.m, n = args.gate.n;
  const int64_t shared = m * share_size<T>(args.shape, cluster) * sizeof(uint4) +
      cluster_forward_extra(args.shape, m, n, args.gate.hidden, kVector<T>);
  return launch(
      cluster_forward_kernel<T>, args.shape.samples * cluster, kThreads, shared, cluster, stream, args);
}

template <typename T>
cudaError_t cluster_backward(const ClusterBackward<T>& args, int cluster, cudaStream_t stream) {
  const int m = args.gate.m, n = args.gate.n;
  const int64_t shared = n * share_size<T>(args.shape, cluster) * sizeof(uint4) +
      cluster_backward_extra(args.shape, m, n, args.gate.hidden);
  return with_tile(m > n ? m : n, [&](auto tile) {
    return launch(
        cluster_backward_kernel<T, tile()>, args.shape.samples * cluster, kThreads, shared, cluster,
        stream, args);
  });
}

#define INSTANTIATE(T)                                                                    \
  template cudaError_t cluster_forward<T>(const ClusterForward<T>&, int, cudaStream_t); \
  template cudaError_t cluster_backward<T>(const ClusterBackward<T>&, int, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace fastroute::cuda
