// Loads and stores of the paths, and index arithmetic.

#pragma once

#include "cuda/device.cuh"
#include "cuda/types.h"

namespace fastroute::cuda {

// Vectors per thread if blocks share a sample, so that a block loads its weights once for 16 KB of each path.
constexpr int kSteps = 4;

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
  T v[V];
};

template <typename T, int V>
__device__ Vec<T, V> load(const T* from) {
  return *reinterpret_cast<const Vec<T, V>*>(from);
}

// 16 bytes, unpacked where they are used. If unpacked when loaded, elements of 2 bytes would take a register each, and fewer
// loads could be in flight.
template <typename T>
__device__ Vec<T, kVector<T>> unpack(const uint4& word) {
  Vec<T, kVector<T>> x;
  memcpy(&x, &word, sizeof(word));
  return x;
}

// max(x, 0) of 16 bytes of elements; keeps NaN.
template <typename T>
__device__ uint4 rectified(uint4 word) {
  const auto part = [](uint32_t x) {
    if constexpr (std::is_same_v<T, float>) {
      return positive_f32(x);
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      return positive_bf16(x);
    } else {
      return positive_f16(x);
    }
  };
  return {part(word.x), part(word.y), part(word.z), part(word.w)};
}

// max(x, 0) of every element if relu; keeps NaN. Whole words take a quarter or half of the instructions of their elements.
template <typename T, int V>
__device__ void rectify(Vec<T, V>& x, bool relu) {
  if constexpr (!std::is_same_v<T, double> && V == kVector<T>) {
    uint4 word;
    memcpy(&word, &x, sizeof(word));
    if (relu) word = rectified<T>(word);
    x = unpack<T>(word);
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) x.v[k] = relu && static_cast<accumulate_t<T>>(x.v[k]) < 0 ? T(0) : x.v[k];
  }
}

// Zero unless x > 0.
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

// Quotient and remainder. 64-bit division takes about 70 instructions and is rarely needed.
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

__device__ inline int64_t quotient(int64_t a, int64_t b) { return Division(a, b).quotient; }
__device__ inline int quotient(int a, int b) { return static_cast<unsigned>(a) / static_cast<unsigned>(b); }

}  // namespace fastroute::cuda
