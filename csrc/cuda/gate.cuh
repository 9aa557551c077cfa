// The gate of one sample, forward and backward, by one block.

#pragma once

#include "cuda/sums.cuh"

namespace fastroute::cuda {

// out[r] = f(<weight[r], in[r / rows]> + bias[r]) for each of m * rows rows. A warp takes four rows at a time, so that four
// loads are in flight when the weights come from global memory.
template <typename A, typename F>
__device__ void dense(
    const A* weight, const A* bias, const A* in, int m, int rows, int64_t width, A* out, F f) {
  constexpr int kRows = 4;
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32; first < m * rows; first += kRows * warps) {
    const A *w[kRows], *z[kRows];
    A sums[kRows], biases[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int r = min(first + k * warps, m * rows - 1);  // past the end, repeat the last row
      w[k] = weight + r * width;
      z[k] = in + r / rows * width;
      sums[k] = 0;
      biases[k] = bias ? bias[r] : A(0);
    }
#pragma unroll 2
    for (int64_t c = lane; c < width; c += 32) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) sums[k] += w[k][c] * z[k][c];
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const A sum = warp_sum(sums[k]);
      const int r = first + k * warps;
      if (lane == 0 && r < m * rows) out[r] = f(sum + biases[k]);
    }
  }
  __syncthreads();
}

// From pooled Z (m, C) to hidden H (m, G), scores A (m, n) and gates G (m, n), in shared or global memory.
template <typename A>
__device__ void gate_forward(const Gate<A>& p, const A* pooled, A* hidden, A* scores, A* gates) {
  if (p.hidden) {  // Eq. 3.4
    dense(p.w1, p.b1, pooled, p.m, p.hidden, p.channels, hidden, [](A sum) {
      return sum < 0 ? A(0) : sum;  // keeps NaN
    });
  }
  dense(p.w2, p.b2, p.hidden ? hidden : pooled, p.m, p.n, p.width(), scores, [](A sum) { return sum; });  // Eq. 3.4, 3.9
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

// From dG (m, n), in shared memory, to dA (m, n), dH (m, G) and, unless null, each channel's share of dX (m, C), the second
// term of Eq. 3.15. The caller's writes to d_gates must already be visible.
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
  const int hidden_width = p.hidden, channels = p.channels;
  for (int r = threadIdx.x; r < p.m * hidden_width; r += blockDim.x) {
    const int i = quotient(r, hidden_width);
    const A* w = p.w2 + static_cast<int64_t>(i) * p.n * hidden_width + (r - i * hidden_width);
    A sum = 0;
#pragma unroll 4
    for (int j = 0; j < p.n; ++j) sum += d_scores[i * p.n + j] * w[static_cast<int64_t>(j) * hidden_width];
    d_hidden[r] = hidden[r] > 0 ? sum : A(0);
  }
  __syncthreads();
  const A *weight = p.hidden ? p.w1 : p.w2, *above = p.hidden ? d_hidden : d_scores;
  const int rows = p.hidden ? hidden_width : p.n;
  for (int r = threadIdx.x; shares && r < p.m * channels; r += blockDim.x) {
    const int i = quotient(r, channels);
    const A* w = weight + static_cast<int64_t>(i) * rows * channels + (r - i * channels);
    A sum = 0;
#pragma unroll 8
    for (int g = 0; g < rows; ++g) sum += above[i * rows + g] * w[static_cast<int64_t>(g) * channels];
    shares[r] = sum / static_cast<A>(space);
  }
  __syncthreads();
}

// The channel of an element of a sample, and its place `inside` the run of contiguous elements of that channel. It walks over
// the elements in equal steps, without a division for each.
template <typename I>
struct ChannelWalk {
  I run, channels, channel, inside, step_channels = 0, step_inside = 0;

  __device__ ChannelWalk(const Shape& shape, I first) : run(shape.run()), channels(shape.channels) {
    const I row = quotient(first, run);
    inside = first - row * run;
    channel = row - quotient(row, channels) * channels;
  }

  __device__ ChannelWalk(const Shape& shape, I first, I step) : ChannelWalk(shape, first) {
    const I rows = quotient(step, run);
    step_inside = step - rows * run;
    step_channels = rows - quotient(rows, channels) * channels;
  }

  __device__ void next() {
    inside += step_inside;
    channel += step_channels;
    if (inside >= run) {
      inside -= run;
      ++channel;
    }
    if (channel >= channels) channel -= channels;
  }
};

// acc[k] += the share of an input's element k, counted from `at`: its gradient through the gate. `shares` has one value per
// channel.
template <int V, typename A, typename I>
__device__ void add_shares(A (&acc)[V], const A* shares, const ChannelWalk<I>& at) {
  const I left = at.run - at.inside;
  if (at.run >= V) {  // of one channel, or of two
    const A share = shares[at.channel], next = left < V ? shares[at.channel + 1] : share;
#pragma unroll
    for (int k = 0; k < V; ++k) acc[k] += k < left ? share : next;
  } else if (at.run == 1 && at.channels % V == 0) {
    const auto share = load<A, V>(shares + at.channel);
#pragma unroll
    for (int k = 0; k < V; ++k) acc[k] += share.v[k];
  } else {
    I channel = at.channel, inside = at.inside;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      acc[k] += shares[channel];
      if (++inside == at.run) {
        inside = 0;
        if (++channel == at.channels) channel = 0;
      }
    }
  }
}

template <int V, typename A, typename I>
__device__ void add_shares(A (&acc)[V], const A* shares, const Shape& shape, I first) {
  add_shares(acc, shares, ChannelWalk<I>(shape, first));
}

}  // namespace fastroute::cuda
