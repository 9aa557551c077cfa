// Loads and stores of the paths, and the arithmetic of positions.

#pragma once

#include "cuda/device.cuh"
#include "cuda/types.h"

namespace fastroute::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Vectors to a thread where blocks share a sample, so that a block's weights are loaded once for 16 KB of each path.
constexpr int kSteps = 4;

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
  T v[V];
};

template <typename T, int V>
__device__ Vec<T, V> load(const T* from) {
  return *reinterpret_cast<const Vec<T, V>*>(from);
}

// max(x, 0) of every element where relu, NaN staying NaN. Without a branch, so that loads are not held up.
template <typename T, int V>
__device__ void rectify(Vec<T, V>& x, bool relu) {
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] = relu && static_cast<accumulate_t<T>>(x.v[k]) < 0 ? T(0) : x.v[k];
}

// Zero where x is not above zero.
template <typename A, typename T, int V>
__device__ void keep_where_positive(A (&values)[V], const Vec<T, V>& x) {
#pragma unroll
  for (int k = 0; k < V; ++k) values[k] = static_cast<accumulate_t<T>>(x.v[k]) > 0 ? values[k] : A(0);
}

template <typename A, typename T, int V>
__device__ void store(T* to, const A (&values)[V]) {
  Vec<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out.v[k] = static_cast<T>(values[k]);
  if constexpr (sizeof(out) == sizeof(uint4)) {
    uint4 word;
    memcpy(&word, &out, sizeof(word));
    store_word(to, word);
  } else {
    *reinterpret_cast<Vec<T, V>*>(to) = out;
  }
}

// Quotient and remainder. 64-bit division is some 70 instructions long, and hardly ever needed.
struct Division {
  int64_t quotient, remainder;

  __device__ Division(int64_t a, int64_t b) {
    if ((a | b) >> 32) {
      quotient = a / b;
      remainder = a - quotient * b;
    } else {
      const auto q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
      quotient = q;
      remainder = static_cast<uint32_t>(a) - q * static_cast<uint32_t>(b);
    }
  }
};

}  // namespace fastroute::cuda
