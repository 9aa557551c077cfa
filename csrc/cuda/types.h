// Types shared by host and kernels.

#pragma once

#include "common.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#else  // planning works on a host without the toolkit
#define __host__
#define __device__
#endif

namespace fastroute::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kThreads = 256;  // of a block
constexpr int kWarps = kThreads / 32;

// Elements per access of a thread: 16 bytes, except for double, which is for gradcheck and accessed one by one.
template <typename T>
constexpr int kVector = std::is_same_v<T, double> ? 1 : 16 / sizeof(T);

// Each path by pointer and batch stride (in elements): paths may come from separate convolutions or from one stack.
template <typename T>
struct Paths {
  T* data[kMaxPaths] = {};
  int64_t stride[kMaxPaths] = {};
  int count = 0;
  bool relu = false;  // of inputs: each element x is read as max(x, 0)

  __host__ __device__ T* sample(int path, int64_t s) const { return data[path] + s * stride[path]; }
};

// A sample is dense as [channels, space], or as [space, channels] where channels_last.
struct Shape {
  int64_t samples, channels, space;
  bool channels_last;

  __host__ __device__ int64_t elements() const { return channels * space; }
  // Number of contiguous elements of one channel.
  __host__ __device__ int64_t run() const { return channels_last ? 1 : space; }
};

// Parameters of all m gates. w1 (m, hidden, channels) is null for the linear gate of Eq. 3.9, whose `hidden` is 0;
// w2 is (m, n, hidden or channels); an absent bias is null.
template <typename A>
struct Gate {
  const A *w1, *b1, *w2, *b2;
  int m, n;
  int64_t channels, hidden;

  __host__ __device__ int64_t width() const { return hidden ? hidden : channels; }
};

}  // namespace fastroute::cuda
