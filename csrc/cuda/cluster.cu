// One-read kernels for sm_90 and later: one cluster of blocks per sample. Each block has its share of the sample's paths in
// shared memory, and sums are exchanged through distributed shared memory. X is read once in the forward; dY and X once in the
// backward.

#include "cuda/gate.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/plan.h"

namespace fastroute::cuda {
namespace {

// A block's share of a sample: the same part [first, first + vectors) of every path, in vectors of 16 bytes. Path p is held at
// p * size.
struct Share {
  int first, vectors, size;
};

template <typename T>
__host__ __device__ int64_t share_size(const Shape& shape, int cluster) {
  return ceil_div(shape.elements() / kVector<T>, cluster);
}

#if FASTROUTE_CLUSTERS

template <typename T>
__device__ Share own_share(const Shape& shape) {
  const int vectors = shape.elements() / kVector<T>, size = share_size<T>(shape, cluster_size());
  const int first = min(size * cluster_rank(), vectors);
  return {first, min(size, vectors - first), size};
}

// Allocates arrays one after another from the block's shared memory.
struct Carve {
  char* at;

  template <typename A>
  __device__ A* take(int64_t count) {
    A* array = reinterpret_cast<A*>(at);
    at += ceil_div(count * sizeof(A), 16) * 16;
    return array;
  }
};

// Starts copying the share of every path, each with its own `landing`; wait for them after a barrier.
template <typename T>
__device__ void hold(const Paths<const T>& paths, int64_t s, const Share& share, uint4* held, uint64_t* landings) {
  if (threadIdx.x) return;
  const uint32_t bytes = share.vectors * sizeof(uint4);
#pragma unroll 1
  for (int p = 0; p < paths.count; ++p) {
    land_begin(landings + p, bytes);
    if (bytes) copy_bulk(held + p * share.size, paths.sample(p, s) + share.first * kVector<T>, bytes, landings + p);
  }
}

// Starts copying floats, or writes zeros if there are none; read them after `copies_wait` and a barrier.
__device__ void hold(const float* from, int count, float* to) {
  const int step = from && (reinterpret_cast<uintptr_t>(from) | count * sizeof(float)) % 16 == 0 ? 4 : 1;
#pragma unroll 1
  for (int r = threadIdx.x * step; r < count; r += kThreads * step) {
    if (step == 4) {
      copy_async<16>(to + r, from + r);
    } else if (from) {
      copy_async<4>(to + r, from + r);
    } else {
      to[r] = 0;
    }
  }
}

// Returns the gate, with its parameters in shared memory if the block holds them, and starts copying them.
__device__ Gate<float> hold(const Gate<float>& gate, bool holds, Carve& memory) {
  const auto take = [&](const float* from, int64_t count) {
    float* to = memory.take<float>(count);
    if (holds) hold(from, count, to);
    return to;
  };
  const float* w1 = take(gate.w1, gate.m * gate.hidden * gate.channels);
  const float* b1 = take(gate.b1, gate.m * gate.hidden);
  const float* w2 = take(gate.w2, gate.m * gate.n * gate.width());
  const float* b2 = take(gate.b2, gate.m * gate.n);
  return {w1, b1, w2, b2, gate.m, gate.n, gate.channels, gate.hidden};
}

// max(x, 0) of a held path.
template <typename T>
__device__ void rectify_held(const Share& share, uint4* path) {
  for (int v = threadIdx.x; v < share.vectors; v += kThreads) {
    rectify(*reinterpret_cast<Vec<T, kVector<T>>*>(path + v), true);
  }
}

// to_b = Σ_a weights[a * from_step + b * to_step] held_a on the share (Eq. 3.7, 3.15). finish(to_b, b, element) modifies the
// vector at that element of the sample before it is stored.
template <typename T, typename F>
__device__ void mix_held(
    const uint4* held, const Share& share, int from, const float* weights, int from_step, int to_step,
    const Paths<T>& to, int64_t s, F finish) {
  constexpr int V = kVector<T>;
  for (int v = threadIdx.x; v < share.vectors; v += kThreads) {
    const int element = (share.first + v) * V;
    for (int b = 0; b < to.count; ++b) {
      float acc[V] = {};
#pragma unroll 2
      for (int a = 0; a < from; ++a) {
        const auto x = load<T, V>(reinterpret_cast<const T*>(held + a * share.size + v));
        const float weight = weights[a * from_step + b * to_step];
#pragma unroll
        for (int k = 0; k < V; ++k) acc[k] += weight * static_cast<float>(x.v[k]);
      }
      finish(acc, b, element);
      store<float, T, V>(to.sample(b, s) + element, acc);
    }
  }
}

// sums[c] of a path over the held share; zero for channels outside the share.
template <typename T, int V>
__device__ void pool_held(const T* path, const Share& share, const Shape& shape, float* scratch, float* sums) {
  const int begin = share.first * kVector<T>, end = begin + share.vectors * kVector<T>;
  const int channels = shape.channels, space = shape.space;
  if (shape.channels_last) {
    column_sums<T, V>(path, begin, end, channels, false, scratch, sums);
    return;
  }
  const int first = begin / space, last = (end + space - 1) / space;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    if (c < first || c >= last) sums[c] = 0;
  }
  int lanes = 1;  // per row: as many as get four vectors each
  while (lanes < 32 && lanes * 4 * V < space) lanes *= 2;
  for (int next = first; next < last; next += kThreads / lanes) {
    const int c = next + threadIdx.x / lanes, row = c * space;
    const float sum = row_sum<T, V, float>(path, max(row, begin) - begin, min(row + space, end) - begin, false, lanes);
    if (c < last && threadIdx.x % lanes == 0) sums[c] = sum;
  }
}

// Sum of part[r] over all blocks of the cluster, in the order of their ranks. All loads are in flight at once: each takes
// several times as long as one from the block's own shared memory.
__device__ float cluster_sum(const float* part, int r) {
  float parts[kLargestCluster], sum = 0;
#pragma unroll
  for (int rank = 0; rank < kLargestCluster; ++rank) {
    parts[rank] = rank < cluster_size() ? of_rank(part, rank)[r] : 0.0f;
  }
#pragma unroll
  for (int rank = 0; rank < kLargestCluster; ++rank) sum += parts[rank];
  return sum;
}

__device__ void copy(const float* from, int count, float* to) {
#pragma unroll 1
  for (int r = threadIdx.x; r < count; r += kThreads) to[r] = from[r];
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
cluster_forward_kernel(const __grid_constant__ ClusterForward<T> args) {
#if FASTROUTE_CLUSTERS
  constexpr int V = kVector<T>;
  const Shape& shape = args.shape;
  const auto& gate = args.gate;
  const int64_t s = blockIdx.x / cluster_size();
  const int m = gate.m, channels = shape.channels, mc = m * channels, mg = m * gate.hidden, mn = m * gate.n;
  const Share share = own_share<T>(shape);

  Carve memory{static_cast<char*>(dynamic_shared())};
  uint4* held = memory.take<uint4>(m * share.size);
  uint64_t* landings = memory.take<uint64_t>(m);
  float* part = memory.take<float>(mc);
  float* pooled = memory.take<float>(mc);
  float* hidden = memory.take<float>(mg);
  float* scores = memory.take<float>(mn);
  float* gates = memory.take<float>(mn);
  float* scratch = memory.take<float>(shape.channels_last ? kThreads * V : 0);

  hold(args.xs, s, share, held, landings);
  const Gate<float> near = hold(gate, args.holds_gate, memory);
  __syncthreads();
  if (args.xs.relu) {
#pragma unroll 1
    for (int i = 0; i < m; ++i) {
      land_wait(landings + i);
      rectify_held<T>(share, held + i * share.size);
    }
    __syncthreads();
  }
  const bool vectors = (shape.channels_last ? channels : shape.space) % V == 0;
  for (int i = 0; i < m; ++i) {
    land_wait(landings + i);
    const T* path = reinterpret_cast<const T*>(held + i * share.size);
    if (vectors) {
      pool_held<T, V>(path, share, shape, scratch, part + i * channels);
    } else {
      pool_held<T, 1>(path, share, shape, scratch, part + i * channels);
    }
  }
  copies_wait();  // gate parameters, visible after the next barrier
  cluster_arrive();
  cluster_wait();
  for (int r = threadIdx.x; r < mc; r += kThreads) {
    pooled[r] = cluster_sum(part, r) / static_cast<float>(shape.space);  // Eq. 3.3
  }
  cluster_arrive();  // this block has read `part` of the others, which must not exit before
  __syncthreads();
  if (args.holds_gate) {
    gate_forward(near, pooled, hidden, scores, gates);
  } else {
    gate_forward(gate, pooled, hidden, scores, gates);
  }
  if (cluster_rank() == 0) {
    copy(pooled, mc, args.pooled + s * mc);
    copy(hidden, mg, args.hidden + s * mg);
    copy(scores, mn, args.scores + s * mn);
    copy(gates, mn, args.gates + s * mn);
  }
  mix_held(held, share, m, gates, gate.n, 1, args.outputs, s, [](auto&, int, int) {});
  cluster_wait();
#endif
}

template <typename T, int TILE>
__global__ void __launch_bounds__(kThreads, TILE == 8 ? 1 : 2)
cluster_backward_kernel(const __grid_constant__ ClusterBackward<T> args) {
#if FASTROUTE_CLUSTERS
  constexpr int V = kVector<T>, kSteps = 8 / TILE;  // 8 vectors of X in flight per thread
  const Shape& shape = args.shape;
  const auto& gate = args.gate;
  const int64_t s = blockIdx.x / cluster_size();
  const int m = gate.m, n = gate.n, mn = m * n, mc = m * shape.channels, mg = m * gate.hidden;
  const Share share = own_share<T>(shape);

  Carve memory{static_cast<char*>(dynamic_shared())};
  uint4* held = memory.take<uint4>(n * share.size);
  uint64_t* landings = memory.take<uint64_t>(n);
  float* scratch = memory.take<float>(kWarps * mn);
  float* part = memory.take<float>(mn);
  float* gates = memory.take<float>(mn);
  float* d_gates = memory.take<float>(mn);
  float* d_scores = memory.take<float>(mn);
  float* d_hidden = memory.take<float>(mg);
  float* grad_gates = memory.take<float>(mn);
  float* grad_scores = memory.take<float>(mn);
  float* hidden = memory.take<float>(mg);
  float* shares = memory.take<float>(mc);

  const auto of_sample = [&](const float* data) { return data ? data + s * mn : nullptr; };
  hold(args.grad_outputs, s, share, held, landings);
  hold(args.gates + s * mn, mn, gates);
  hold(of_sample(args.grad_gates), mn, grad_gates);
  hold(of_sample(args.grad_scores), mn, grad_scores);
  hold(args.hidden + s * mg, mg, hidden);
  const Gate<float> near = hold(gate, args.holds_gate, memory);
  __syncthreads();
  float acc[TILE][TILE] = {};
  for (int first = threadIdx.x; first < share.vectors; first += kSteps * kThreads) {
    uint4 words[kSteps][TILE];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int v = first + step * kThreads;
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        if (i < m && v < share.vectors) {
          words[step][i] = reinterpret_cast<const uint4*>(args.xs.sample(i, s))[share.first + v];
        }
      }
    }
#pragma unroll 1
    for (int j = 0; j < n; ++j) land_wait(landings + j);  // after the first loads of X are issued
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int v = first + step * kThreads;
      if (v < share.vectors) {
        Vec<T, V> x[TILE];
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
          if (i < m) {
            x[i] = unpack<T>(words[step][i]);
            rectify(x[i], args.xs.relu);
          }
        }
#pragma unroll
        for (int j = 0; j < TILE; ++j) {
          if (j < n) {
            const auto dy = load<T, V>(reinterpret_cast<const T*>(held + j * share.size + v));
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
              if (i < m) {
#pragma unroll
                for (int k = 0; k < V; ++k) {
                  acc[i][j] += static_cast<float>(x[i].v[k]) * static_cast<float>(dy.v[k]);
                }
              }
            }
          }
        }
      }
    }
  }
  copies_wait();  // small copies, visible after the next barrier
  block_sums(acc, m, n, scratch, part);
  cluster_arrive();
  cluster_wait();
  if (const int r = threadIdx.x; r < mn) d_gates[r] = cluster_sum(part, r) + grad_gates[r];  // Eq. 3.10
  cluster_arrive();  // this block has read `part` of the others, which must not exit before
  __syncthreads();
  if (args.holds_gate) {
    gate_backward(near, shape.space, gates, hidden, d_gates, grad_scores, d_scores, d_hidden, shares);
  } else {
    gate_backward(gate, shape.space, gates, hidden, d_gates, grad_scores, d_scores, d_hidden, shares);
  }
  if (cluster_rank() == 0) {
    copy(d_scores, mn, args.d_scores + s * mn);
    copy(d_hidden, mg, args.d_hidden + s * mg);
  }
  mix_held(held, share, n, gates, 1, n, args.grad_xs, s, [&](auto& dx, int i, int element) {
    add_shares(dx, shares + i * shape.channels, shape, element);
    if (args.xs.relu) keep_where_positive(dx, load<T, V>(args.xs.sample(i, s) + element));
  });
  cluster_wait();
#endif
}

int64_t gate_bytes(const Gate<float>& gate) {
  return float_bytes(gate.m * gate.hidden * gate.channels) + float_bytes(gate.m * gate.hidden) +
      float_bytes(gate.m * gate.n * gate.width()) + float_bytes(gate.m * gate.n);
}

// Launches with the shared memory of a block, including that of the gate if the block holds it.
template <typename... P, typename Args>
cudaError_t launch_holding(void (*kernel)(P...), int64_t shared, int cluster, cudaStream_t stream, Args& args) {
  const int64_t gate = gate_bytes(args.gate);
  args.holds_gate = holds_gate(shared, gate, device());
  return launch(
      kernel, args.shape.samples * cluster, kThreads, shared + (args.holds_gate ? gate : 0), cluster, stream, args);
}

}  // namespace

cudaError_t code_architecture(int* architecture) {
  cudaFuncAttributes attributes;
  const auto error = cudaFuncGetAttributes(&attributes, cluster_forward_kernel<float>);
  *architecture = attributes.ptxVersion;
  return error;
}

template <typename T>
cudaError_t cluster_forward(ClusterForward<T> args, int cluster, cudaStream_t stream) {
  const int m = args.gate.m, n = args.gate.n;
  const int64_t shared = m * share_size<T>(args.shape, cluster) * sizeof(uint4) +
      cluster_forward_extra(args.shape, m, n, args.gate.hidden, kVector<T>);
  return launch_holding(cluster_forward_kernel<T>, shared, cluster, stream, args);
}

template <typename T>
cudaError_t cluster_backward(ClusterBackward<T> args, int cluster, cudaStream_t stream) {
  const int m = args.gate.m, n = args.gate.n;
  const int64_t shared = n * share_size<T>(args.shape, cluster) * sizeof(uint4) +
      cluster_backward_extra(args.shape, m, n, args.gate.hidden);
  return with_tile(m > n ? m : n, [&](auto tile) {
    return launch_holding(cluster_backward_kernel<T, tile()>, shared, cluster, stream, args);
  });
}

#define INSTANTIATE(T)                                                             \
  template cudaError_t cluster_forward<T>(ClusterForward<T>, int, cudaStream_t); \
  template cudaError_t cluster_backward<T>(ClusterBackward<T>, int, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace fastroute::cuda
