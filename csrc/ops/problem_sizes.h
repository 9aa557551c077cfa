// The fixed preference between the compiled CUDA kernels and Triton on a GPU that supports both. Times are in microseconds, on an
// H100 (docs/gpu-path.md); a row without times is based on a count.

#pragma once

#include "cuda/plan.h"
#include "paths.h"

namespace fastroute {

// kNativeClusters: the compiled kernels if the GPU has thread-block clusters with an H100's shared memory, else Triton.
enum class First { kTriton, kNative, kNativeClusters };

// mix, gate and the mixture-EM loss: both backends move the same bytes, and Triton is preferred.
constexpr First kFirstForOnePass = First::kTriton;

// cross_predict: convolutions dominate, and the compiled passes between them run without Python.
constexpr First kFirstForCrossPredict = First::kNative;

// cross_connect needs the paths twice, and its backward the gradients of the outputs. By the bytes of one sample of these:
//
// | bytes needed twice | first | why |
// |---|---|---|
// | up to 128 KiB | Triton | its resident tier holds them in registers: forward 6.6 to 17.3, native 11.1 to 20.6 |
// | the same, backward of over 64 KiB and 264 samples | native | registers do not hold both: 163, Triton 209 |
// | a thread-block cluster holds them | native | one read, m + n path bytes, Triton two; bf16 NCHW forward 33 to 171, Triton 53 to 253 |
// | the same, 1024 channels and more | Triton | each block of a cluster reads all of W1, at 44 to 58 % of the copy |
// | more | Triton | two reads in both |
//
// The capacity of a cluster is counted for an H100 (csrc/cuda/EXPECTED.md). sm_100 has the same; sm_120, with clusters but less
// shared memory, counts as without them.
inline First first_for_two_reads(
    const cuda::Shape& shape, int64_t element_bytes, int64_t m, int64_t n, int64_t hidden, bool relu, bool backward) {
  constexpr int64_t kHeldByOne = int64_t{128} << 10, kHeldInBackward = int64_t{64} << 10, kWide = 1024;
  constexpr cuda::Device kH100{90, 132, 227 << 10, 228 << 10};
  const int64_t held = backward && shape.samples > 2 * kH100.multiprocessors ? kHeldInBackward : kHeldByOne;
  const int64_t read_twice = (backward ? n : m) * shape.elements() * element_bytes;
  if (shape.samples == 0 || shape.channels >= kWide || read_twice <= held) return First::kTriton;
  const int64_t cluster = backward ? cuda::backward_cluster(shape, m, n, hidden, element_bytes, kH100, relu)
                                   : cuda::forward_cluster(shape, m, n, hidden, element_bytes, kH100);
  return cluster ? First::kNativeClusters : First::kTriton;
}

// The same for paths like x. Only CUDA has such a choice.
inline First first_for_two_reads(const at::Tensor& x, int64_t m, int64_t n, int64_t hidden, bool relu, bool backward) {
  if (!x.is_cuda()) return First::kTriton;
  const Geometry g(x);
  const cuda::Shape shape{g.batch, g.channels, g.size, g.channels_last || g.size == 1};
  return first_for_two_reads(shape, static_cast<int64_t>(x.element_size()), m, n, hidden, relu, backward);
}

}  // namespace fastroute
