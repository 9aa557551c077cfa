// One-read kernels for sm_90 and later: one cluster of blocks per sample. Each block has its share of the sample's paths in
// shared memory, and sums are exchanged through distributed shared memory. X is read once in the forward; dY and X once in the
// backward. A cluster takes one sample after another: the next one lands in the place of what has been mixed.

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

// The shares of a block's paths in shared memory, and the samples that land there one after another, each path in pieces.
template <typename T>
struct Held {
  const Paths<const T>& paths;
  Share share;
  uint4* data;
  uint64_t* landings;  // of each path, one for each piece
  int piece;  // vectors of a piece, a multiple of the threads
  uint32_t phase = 0;

  __device__ Held(const Paths<const T>& paths, const Share& share, Carve& memory)
      : paths(paths), share(share), data(memory.take<uint4>(paths.count * share.size)),
        landings(memory.take<uint64_t>(paths.count * kPieces)),
        piece(max((share.size + kPieces * kThreads - 1) / (kPieces * kThreads), 1) * kThreads) {
    if (threadIdx.x == 0) {
      for (int k = 0; k < paths.count * kPieces; ++k) land_init(landings + k);
    }
  }

  __device__ uint4* path(int p) const { return data + p * share.size; }

  // Starts copying a piece of a sample's path. Before others wait for the first sample, they need a barrier.
  __device__ void fetch(int64_t s, int p, int k) const {
    const int begin = k * piece, vectors = min(piece, share.vectors - begin);
    if (threadIdx.x || vectors <= 0) return;
    uint64_t* landing = landings + p * kPieces + k;
    land_begin(landing, vectors * sizeof(uint4));
    copy_bulk(
        path(p) + begin, paths.sample(p, s) + (share.first + begin) * kVector<T>, vectors * sizeof(uint4), landing);
  }

  // The same of every path.
  __device__ void fetch(int64_t s, int k) const {
#pragma unroll 1
    for (int p = 0; p < paths.count; ++p) fetch(s, p, k);
  }

  __device__ void wait(int p, int k) const {
    if (k * piece < share.vectors) land_wait(landings + p * kPieces + k, phase);
  }
};

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

// to_b = Σ_a weights[a * from_step + b * to_step] held_a on the share (Eq. 3.7, 3.15), and meanwhile starts copying sample
// `next`, if it is one, in the place of what all threads have read. finish(to_b, b, v, channel) modifies the vector v of the
// share before it is stored.
template <int TILE, typename T, typename F>
__device__ void mix_held(
    const Held<T>& held, const float* weights, int from_step, int to_step, const Paths<T>& to, const Shape& shape, int64_t s,
    int64_t next, F finish) {
  constexpr int V = kVector<T>;
  constexpr bool kFew = TILE <= 4;  // weights fit into registers
  const int vectors = held.share.vectors, from = held.paths.count;
  const auto weight = [&](int a, int b) { return a < from && b < to.count ? weights[a * from_step + b * to_step] : 0.0f; };
  float few[kFew ? TILE : 1][kFew ? TILE : 1];
  if constexpr (kFew) {
#pragma unroll
    for (int a = 0; a < TILE; ++a) {
#pragma unroll
      for (int b = 0; b < TILE; ++b) few[a][b] = weight(a, b);
    }
  }
  ChannelWalk<int> channel(shape, (held.share.first + static_cast<int>(threadIdx.x)) * V, kThreads * V);
#pragma unroll 1
  for (int k = 0; k < kPieces; ++k) {
    const int end = min((k + 1) * held.piece, vectors);
#pragma unroll 1
    for (int v = k * held.piece + threadIdx.x; v < end; v += kThreads, channel.next()) {
      uint4 words[TILE];
#pragma unroll
      for (int a = 0; a < TILE; ++a) {
        if (a < from) {
          words[a] = held.path(a)[v];
          if (held.paths.relu) words[a] = rectified<T>(words[a]);
        }
      }
#pragma unroll
      for (int b = 0; b < TILE; ++b) {
        if (b < to.count) {
          float acc[V] = {};
#pragma unroll
          for (int a = 0; a < TILE; ++a) {
            if (a < from) {
              const auto x = unpack<T>(words[a]);
              float w;
              if constexpr (kFew) {
                w = few[a][b];
              } else {
                w = weight(a, b);
              }
#pragma unroll
              for (int i = 0; i < V; ++i) acc[i] += w * static_cast<float>(x.v[i]);
            }
          }
          finish(acc, b, v, channel);
          store<float, T, V>(to.sample(b, s) + (held.share.first + v) * V, acc);
        }
      }
    }
    if (next < shape.samples) {
      release_to_copies();
      __syncthreads();
      held.fetch(next, k);
    }
  }
}

// sums[c] of path p over the held share; zero for channels outside the share.
template <typename T>
__device__ void pool_held(const Held<T>& held, int p, const Shape& shape, float* scratch, float* sums) {
  constexpr int V = kVector<T>;
  const T* path = reinterpret_cast<const T*>(held.path(p));
  const int begin = held.share.first * V, end = begin + held.share.vectors * V;
  const int channels = shape.channels, space = shape.space;
  const bool relu = held.paths.relu;
#pragma unroll 1
  for (int k = 0; k < kPieces; ++k) held.wait(p, k);
  if (shape.channels_last) {
    if (channels % V == 0) {
      column_sums<T, V>(path, begin, end, channels, relu, scratch, sums);
    } else {
      column_sums<T, 1>(path, begin, end, channels, relu, scratch, sums);
    }
    return;
  }
  const int first = quotient(begin, space), last = quotient(end + space - 1, space);
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    if (c < first || c >= last) sums[c] = 0;
  }
  int lanes = 1;  // per row: as many as get four vectors each
  while (lanes < 32 && lanes * 4 * V < space) lanes *= 2;
  for (int next = first; next < last; next += kThreads / lanes) {
    const int c = next + threadIdx.x / lanes, row = c * space;
    const float sum =
        unaligned_row_sum<T, float>(path, max(row, begin) - begin, min(row + space, end) - begin, relu, lanes);
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

template <typename T, int TILE>
__global__ void __launch_bounds__(kThreads, TILE == 8 ? 1 : 2)
cluster_forward_kernel(const __grid_constant__ ClusterForward<T> args) {
#if FASTROUTE_CLUSTERS
  constexpr int V = kVector<T>;
  const Shape& shape = args.shape;
  const auto& gate = args.gate;
  const int m = gate.m, channels = shape.channels, mc = m * channels, mg = m * gate.hidden, mn = m * gate.n;
  const Share share = own_share<T>(shape);

  Carve memory{static_cast<char*>(dynamic_shared())};
  Held<T> held(args.xs, share, memory);
  float* part = memory.take<float>(mc);
  float* pooled = memory.take<float>(mc);
  float* hidden = memory.take<float>(mg);
  float* scores = memory.take<float>(mn);
  float* gates = memory.take<float>(mn);
  float* scratch = memory.take<float>(shape.channels_last ? kThreads * V : 0);

  int64_t s = blockIdx.x / cluster_size();
#pragma unroll 1
  for (int k = 0; k < m * kPieces; ++k) held.fetch(s, k / kPieces, k % kPieces);  // in the order in which paths are pooled
  const Gate<float> near = hold(gate, args.holds_gate, memory);
  __syncthreads();
  for (; s < shape.samples; s += args.clusters, held.phase ^= 1) {
#pragma unroll 1
    for (int i = 0; i < m; ++i) pool_held(held, i, shape, scratch, part + i * channels);
    copies_wait();  // gate parameters, visible after the next barrier
    cluster_arrive();
    cluster_wait();
    for (int r = threadIdx.x; r < mc; r += kThreads) {
      pooled[r] = cluster_sum(part, r) / static_cast<float>(shape.space);  // Eq. 3.3
    }
    cluster_arrive();  // this block has read `part` of the others, which must not change before
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
    mix_held<TILE>(held, gates, gate.n, 1, args.outputs, shape, s, s + args.clusters, [](auto&, int, int, auto&) {});
    cluster_wait();
  }
#endif
}

template <typename T, int V>
__device__ uint8_t positive_bits(const Vec<T, V>& x) {
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) bits |= static_cast<float>(x.v[k]) > 0 ? 1u << k : 0u;
  return bits;
}

// Vectors of X that a thread loads at once.
template <typename T, int TILE>
struct Words {
  static constexpr int kSteps = TILE == 2 ? 4 : 1;
  uint4 words[kSteps][TILE];

  __device__ void load(const Paths<const T>& xs, int64_t s, const Share& share, int first) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int v = first + step * kThreads;
#pragma unroll
      for (int i = 0; i < TILE; ++i) {
        if (i < xs.count && v < share.vectors) {
          words[step][i] = reinterpret_cast<const uint4*>(xs.sample(i, s))[share.first + v];
        }
      }
    }
  }
};

template <typename T, int TILE>
__global__ void __launch_bounds__(kThreads, TILE == 8 ? 1 : 2)
cluster_backward_kernel(const __grid_constant__ ClusterBackward<T> args) {
#if FASTROUTE_CLUSTERS
  constexpr int V = kVector<T>, kAtOnce = Words<T, TILE>::kSteps;
  const Shape& shape = args.shape;
  const auto& gate = args.gate;
  const int m = gate.m, n = gate.n, mn = m * n, mc = m * shape.channels, mg = m * gate.hidden;
  const Share share = own_share<T>(shape);

  Carve memory{static_cast<char*>(dynamic_shared())};
  Held<T> held(args.grad_outputs, share, memory);
  const bool relu = args.xs.relu;
  uint8_t* positive = memory.take<uint8_t>(relu ? m * share.size : 0);  // bit k of a vector: x.v[k] > 0
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

  int64_t s = blockIdx.x / cluster_size();
#pragma unroll 1
  for (int k = 0; k < kPieces; ++k) held.fetch(s, k);
  Words<T, TILE> ahead;  // the first vectors of X of the next sample
  ahead.load(args.xs, s, share, threadIdx.x);
  const Gate<float> near = hold(gate, args.holds_gate, memory);
  __syncthreads();
  for (; s < shape.samples; s += args.clusters, held.phase ^= 1) {
    const int64_t next = s + args.clusters;
    const auto of_sample = [&](const float* array) { return array ? array + s * mn : nullptr; };
    hold(args.gates + s * mn, mn, gates);
    hold(of_sample(args.grad_gates), mn, grad_gates);
    hold(of_sample(args.grad_scores), mn, grad_scores);
    hold(args.hidden + s * mg, mg, hidden);
    float acc[TILE][TILE] = {};
    int landed = 0;  // pieces
#pragma unroll 1
    for (int base = 0; base < share.vectors; base += kAtOnce * kThreads) {
      const int first = base + threadIdx.x;
      const Words<T, TILE> now = ahead;
      ahead.load(args.xs, s, share, first + kAtOnce * kThreads);
      for (; landed * held.piece < min(base + kAtOnce * kThreads, share.vectors); ++landed) {
#pragma unroll 1
        for (int j = 0; j < n; ++j) held.wait(j, landed);
      }
#pragma unroll
      for (int step = 0; step < kAtOnce; ++step) {
        const int v = first + step * kThreads;
        if (v < share.vectors) {
          Vec<T, V> x[TILE];
#pragma unroll
          for (int i = 0; i < TILE; ++i) {
            if (i < m) {
              x[i] = unpack<T>(relu ? rectified<T>(now.words[step][i]) : now.words[step][i]);
              if (relu) positive[i * share.size + v] = positive_bits(x[i]);
            }
          }
#pragma unroll
          for (int j = 0; j < TILE; ++j) {
            if (j < n) {
              const auto dy = unpack<T>(held.path(j)[v]);
#pragma unroll
              for (int i = 0; i < TILE; ++i) {
                if (i < m) {
                  float product = 0;
#pragma unroll
                  for (int k = 0; k < V; ++k) {
                    product += static_cast<float>(x[i].v[k]) * static_cast<float>(dy.v[k]);
                  }
                  acc[i][j] += product;
                }
              }
            }
          }
        }
      }
    }
    if (next < shape.samples) ahead.load(args.xs, next, share, threadIdx.x);
    copies_wait();  // small copies, visible after the next barrier
    block_sums(acc, m, n, scratch, part);
    cluster_arrive();
    cluster_wait();
    if (const int r = threadIdx.x; r < mn) d_gates[r] = cluster_sum(part, r) + grad_gates[r];  // Eq. 3.10
    cluster_arrive();  // this block has read `part` of the others, which must not change before
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
    mix_held<TILE>(held, gates, 1, n, args.grad_xs, shape, s, next, [&](auto& dx, int i, int v, const auto& channel) {
      add_shares(dx, shares + i * shape.channels, channel);
      if (relu) {
        const uint32_t bits = positive[i * share.size + v];
#pragma unroll
        for (int k = 0; k < V; ++k) dx[k] = bits >> k & 1 ? dx[k] : 0.0f;
      }
    });
    cluster_wait();
  }
#endif
}

int64_t gate_bytes(const Gate<float>& gate) {
  return float_bytes(gate.m * gate.hidden * gate.channels) + float_bytes(gate.m * gate.hidden) +
      float_bytes(gate.m * gate.n * gate.width()) + float_bytes(gate.m * gate.n);
}

// Launches as many clusters as run at once, with the shared memory of a block, including that of the gate if the block holds
// it.
template <typename... P, typename Args>
cudaError_t launch_holding(void (*kernel)(P...), int64_t shared, int cluster, cudaStream_t stream, Args& args) {
  if (args.shape.samples == 0) return cudaSuccess;
  const int64_t gate = gate_bytes(args.gate);
  args.holds_gate = holds_gate(shared, gate, device());
  if (args.holds_gate) shared += gate;
  int at_once = 0;
  const auto error = clusters_at_once(kernel, kThreads, shared, cluster, &at_once);
  if (error != cudaSuccess) return error;
  args.clusters = std::clamp<int64_t>(at_once, 1, args.shape.samples);
  return launch(kernel, args.clusters * cluster, kThreads, shared, cluster, stream, args);
}

}  // namespace

cudaError_t code_architecture(int* architecture) {
  cudaFuncAttributes attributes;
  const auto error = cudaFuncGetAttributes(&attributes, cluster_forward_kernel<float, 2>);
  *architecture = attributes.ptxVersion;
  return error;
}

template <typename T>
cudaError_t cluster_forward(ClusterForward<T> args, int cluster, cudaStream_t stream) {
  const int m = args.gate.m, n = args.gate.n;
  const int64_t shared = block_bytes(
      m, args.shape.elements() * sizeof(T), cluster_forward_extra(args.shape, m, n, args.gate.hidden, kVector<T>), cluster, 0);
  return with_tile(m > n ? m : n, [&](auto tile) {
    return launch_holding(cluster_forward_kernel<T, tile()>, shared, cluster, stream, args);
  });
}

template <typename T>
cudaError_t cluster_backward(ClusterBackward<T> args, int cluster, cudaStream_t stream) {
  const int m = args.gate.m, n = args.gate.n;
  const int64_t shared = block_bytes(
      n, args.shape.elements() * sizeof(T), cluster_backward_extra(args.shape, m, n, args.gate.hidden), cluster,
      args.xs.relu ? m : 0);
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
