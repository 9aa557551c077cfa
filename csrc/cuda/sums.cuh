// Sums over a warp, a block, a row and a column, each in a fixed order: results are bitwise reproducible.

#pragma once

#include "cuda/paths.cuh"

namespace fastroute::cuda {

// Sum over the 32 lanes, in all of them. The whole warp must take part.
template <typename A>
__device__ A warp_sum(A value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Sum of data[begin, end), with relu of max(x, 0), by each group of `lanes` lanes of a warp, a power of two. The whole warp
// must take part. Begin, end and the address of data are multiples of V elements.
template <typename T, int V, typename A, typename I>
__device__ A row_sum(const T* data, I begin, I end, bool relu, int lanes = 32) {
  A sums[V] = {};
#pragma unroll 4
  for (I e = begin + threadIdx.x % lanes * V; e < end; e += lanes * V) {
    auto x = load<T, V>(data + e);
    rectify(x, relu);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] += static_cast<A>(x.v[k]);
  }
  A sum = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) sum += sums[k];
  for (int mask = lanes / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// The same where begin and end are at any element of 16-byte aligned data: whole vectors inside the row, and single elements
// before and after them.
template <typename T, typename A>
__device__ A unaligned_row_sum(const T* data, int begin, int end, bool relu, int lanes) {
  constexpr int V = kVector<T>;
  const int lane = threadIdx.x % lanes;
  const int first = min((begin + V - 1) / V * V, end), last = max(first, end / V * V);
  A sums[V] = {}, sum = 0;
#pragma unroll 4
  for (int e = first + lane * V; e < last; e += lanes * V) {
    uint4 word = *reinterpret_cast<const uint4*>(data + e);
    if (relu) word = rectified<T>(word);
    const auto x = unpack<T>(word);
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] += static_cast<A>(x.v[k]);
  }
  const auto add = [&](int from, int to) {
    for (int e = from + lane; e < to; e += lanes) {
      auto x = load<T, 1>(data + e);
      rectify(x, relu);
      sum += static_cast<A>(x.v[0]);
    }
  };
  add(begin, first);
  add(last, end);
#pragma unroll
  for (int k = 0; k < V; ++k) sum += sums[k];
  for (int mask = lanes / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// sums[c] = Σ of the elements c, c + channels, … within [begin, end) of a sample, by one block; `data` points to element
// `begin`. Channels and begin are multiples of V, scratch holds blockDim.x * V values. Ends with a barrier.
template <typename T, int V, typename A>
__device__ void column_sums(
    const T* data, int64_t begin, int64_t end, int64_t channels, bool relu, A* scratch, A* sums) {
  const int thread = threadIdx.x, threads = blockDim.x;
  for (int64_t first = 0; first < channels / V; first += threads) {
    const int width = min(channels / V - first, static_cast<int64_t>(threads));
    const int groups = threads / width, group = thread / width;  // group g has the rows g, g + groups, …
    const int64_t channel = (first + thread % width) * V, step = groups * channels;
    A sum[V] = {};
    if (group < groups) {
      int64_t e = (begin / channels + group) * channels + channel;
      if (e < begin) e += step;
#pragma unroll 4
      for (; e < end; e += step) {
        auto x = load<T, V>(data + (e - begin));
        rectify(x, relu);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] += static_cast<A>(x.v[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) scratch[thread * V + k] = sum[k];
    __syncthreads();
    int half = 1;
    while (half < groups) half *= 2;
    while (half /= 2) {
      if (group < half && group + half < groups) {
#pragma unroll
        for (int k = 0; k < V; ++k) scratch[thread * V + k] += scratch[(thread + half * width) * V + k];
      }
      __syncthreads();
    }
    if (thread < width) {
#pragma unroll
      for (int k = 0; k < V; ++k) sums[channel + k] = scratch[thread * V + k];
    }
    __syncthreads();
  }
}

// out[i * n + j] = acc[i][j] summed over the block, for i < m, j < n. Scratch holds one m * n for each warp.
template <int TILE, typename A>
__device__ void block_sums(const A (&acc)[TILE][TILE], int m, int n, A* scratch, A* out) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int i = 0; i < TILE; ++i) {
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
      if (i < m && j < n) {
        const A sum = warp_sum(acc[i][j]);
        if (threadIdx.x % 32 == 0) scratch[warp * m * n + i * n + j] = sum;
      }
    }
  }
  __syncthreads();
  for (int r = threadIdx.x; r < m * n; r += blockDim.x) {
    A sum = 0;
    for (int w = 0; w < warps; ++w) sum += scratch[w * m * n + r];
    out[r] = sum;
  }
}

}  // namespace fastroute::cuda
