// The gate of one sample, forward and backward, by one block.

#pragma once

#include "cuda/sums.cuh"

namespace fastroute::cuda {

// out[r] = f(<weight[r], in[r / rows]>, r) for each of m * rows rows, a warp to a row.
template <typename A, typename F>
__device__ void dense(const A* weight, const A* in, int64_t m, int64_t rows, int64_t width, A* out, F f) {
  for (int64_t r = threadIdx.x / 32; r < m * rows; r += blockDim.x / 32) {
    const A *w = weight + r * width, *z = in + Division(r, rows).quotient * width;
    A sum = 0;
#pragma unroll 4
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) sum += w[c] * z[c];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out[r] = f(sum, r);
  }
  __syncthreads();
}

// From pooled Z (m, C) to hidden H (m, G), scores A (m, n) and gates G (m, n), in shared or global memory.
template <typename A>
__device__ void gate_forward(const Gate<A>& p, const A* pooled, A* hidden, A* scores, A* gates) {
  if (p.w1) {  // Eq. 3.4
    dense(p.w1, pooled, p.m, p.hidden, p.channels, hidden, [&](A sum, int64_t r) {
      if (p.b1) sum += p.b1[r];
      return sum < 0 ? A(0) : sum;  // so that NaN stays
    });
  }
  dense(p.w2, p.w1 ? hidden : pooled, p.m, p.n, p.width(), scores, [&](A sum, int64_t r) {  // Eq. 3.4, or 3.9
    return p.b2 ? sum + p.b2[r] : sum;
  });
  for (int i = threadIdx.x; i < p.m; i += blockDim.x) {  // Eq. 3.5
    const A* a = scores + i * p.n;
    A* g = gates + i * p.n;
    A largest = a[0], total = 0;
    for (int j = 1; j < p.n; ++j) largest = a[j] > largest ? a[j] : largest;
    for (int j = 0; j < p.n; ++j) total += g[j] = exp(a[j] - largest);
    for (int j = 0; j < p.n; ++j) g[j] /= total;
  }
  __syncthreads();
}

// From dG (m, n), in shared memory, to dA (m, n), dH (m, G) and, unless it is null, each channel's share of dX (m, C),
// the second term of Eq. 3.15. The caller's writes to d_gates must be visible already.
template <typename A>
__device__ void gate_backward(
    const Gate<A>& p, int64_t space, const A* gates, const A* hidden, const A* d_gates, const A* grad_scores,
    A* d_scores, A* d_hidden, A* shares) {
  for (int i = threadIdx.x; i < p.m; i += blockDim.x) {
    A dot = 0;
    for (int j = i * p.n; j < (i + 1) * p.n; ++j) dot += gates[j] * d_gates[j];
    for (int j = i * p.n; j < (i + 1) * p.n; ++j) {  // Eq. 3.12, with J of 3.13 multiplied out
      d_scores[j] = gates[j] * (d_gates[j] - dot) + (grad_scores ? grad_scores[j] : A(0));
    }
  }
  __syncthreads();
  for (int64_t r = threadIdx.x; p.w1 && r < p.m * p.hidden; r += blockDim.x) {
    const Division at(r, p.hidden);
    A sum = 0;
    for (int j = 0; j < p.n; ++j) {
      const int64_t row = at.quotient * p.n + j;
      sum += d_scores[row] * p.w2[row * p.hidden + at.remainder];
    }
    d_hidden[r] = hidden[r] > 0 ? sum : A(0);
  }
  __syncthreads();
  const A *weight = p.w1 ? p.w1 : p.w2, *above = p.w1 ? d_hidden : d_scores;
  const int64_t rows = p.w1 ? p.hidden : p.n;
  for (int64_t r = threadIdx.x; shares && r < p.m * p.channels; r += blockDim.x) {
    const Division at(r, p.channels);
    A sum = 0;
#pragma unroll 4
    for (int64_t g = at.quotient * rows; g < (at.quotient + 1) * rows; ++g) {
      sum += above[g] * weight[g * p.channels + at.remainder];
    }
    shares[r] = sum / static_cast<A>(space);
  }
  __syncthreads();
}

// acc[k] += what the gate of an input adds to its elements `first` + k; `shares` has one value for each channel.
template <int V, typename A>
__device__ void add_shares(A (&acc)[V], const A* shares, const Shape& shape, int64_t first) {
  const int64_t run = shape.run();
  const Division at(first, run);
  int64_t channel = Division(at.quotient, shape.channels).remainder, inside = at.remainder;
  if (run % V == 0) {
    const A share = shares[channel];
#pragma unroll
    for (int k = 0; k < V; ++k) acc[k] += share;
  } else if (run == 1 && shape.channels % V == 0) {
    const auto share = load<A, V>(shares + channel);
#pragma unroll
    for (int k = 0; k < V; ++k) acc[k] += share.v[k];
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      acc[k] += shares[channel];
      if (++inside == run) {
        inside = 0;
        if (++channel == shape.channels) channel = 0;
      }
    }
  }
}

}  // namespace fastroute::cuda
