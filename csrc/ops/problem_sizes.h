// The frozen table of who comes first on a GPU where the compiled CUDA kernels and Triton can both serve. No row has been
// measured on a card yet: each gives the count that it rests on.

#pragma once

#include "paths.h"

namespace fastroute {

// kNativeClusters: the compiled kernels where the card has clusters of multiprocessors, else Triton.
enum class First { kTriton, kNative, kNativeClusters };

// mix, gate and the mixture-EM loss: both backends move the same bytes, and Triton is first among equals.
constexpr First kFirstForOnePass = First::kTriton;

// cross_predict: convolutions take most of the time, and the compiled passes are called between them without Python.
constexpr First kFirstForCrossPredict = First::kNative;

// cross_connect needs the paths twice, and its backward the gradients of the outputs: `tensors` of x's size.
//
// | bytes of one sample that are needed twice | first | why |
// |---|---|---|
// | up to 128 KiB | Triton | its resident tier holds them in half the registers of a multiprocessor: one read in both |
// | up to 8 × 200 KiB | native | a cluster of 8 multiprocessors holds them in shared memory and reads them once, where Triton reads them twice: m + n path bytes for 2m + n |
// | more | Triton | two reads in both |
inline First first_for_two_reads(const at::Tensor& x, size_t tensors) {
  constexpr int64_t kHeldByOne = int64_t{128} << 10, kHeldByCluster = int64_t{8} * 200 << 10;
  if (!x.is_cuda() || x.size(0) == 0) return First::kTriton;
  const int64_t sample = x.numel() / x.size(0) * static_cast<int64_t>(x.element_size());
  const int64_t held = static_cast<int64_t>(tensors) * sample;
  const bool in_vectors = sample % 16 == 0;  // which the clusters need
  return in_vectors && held > kHeldByOne && held <= kHeldByCluster ? First::kNativeClusters : First::kTriton;
}

}  // namespace fastroute
