// First pass of the forward: global average pooling (Eq. 3.3), as sums over slices of the space.

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sums.cuh"

namespace fastroute::cuda {
namespace {

// [channels, space]: one warp per slice of a channel.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
pool_rows_kernel(const __grid_constant__ Paths<const T> xs, const Shape shape, int64_t slices, accumulate_t<T>* sums) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Division c(warp, shape.channels), i(c.quotient, xs.count), s(i.quotient, shape.samples);
  const int64_t slice = s.quotient, vectors = shape.space / V;
  if (slice >= slices) return;
  const T* row = xs.sample(i.remainder, s.remainder) + c.remainder * shape.space;
  const int64_t begin = slice * vectors / slices * V, end = (slice + 1) * vectors / slices * V;
  const auto sum = row_sum<T, V, accumulate_t<T>>(row, begin, end, xs.relu);
  if (threadIdx.x % 32 == 0) sums[warp] = sum;
}

// [space, channels]: one block per slice of a sample of one path.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2) pool_columns_kernel(
    const __grid_constant__ Paths<const T> xs, const Shape shape, int64_t slices, accumulate_t<T>* sums) {
  __shared__ accumulate_t<T> scratch[kThreads * V];
  const Division i(blockIdx.x, xs.count), s(i.quotient, shape.samples);
  const int64_t slice = s.quotient, begin = slice * shape.space / slices, end = (slice + 1) * shape.space / slices;
  const T* rows = xs.sample(i.remainder, s.remainder) + begin * shape.channels;
  column_sums<T, V>(
      rows, 0, (end - begin) * shape.channels, shape.channels, xs.relu, scratch, sums + blockIdx.x * shape.channels);
}

}  // namespace

template <typename T>
cudaError_t pool(
    const Paths<const T>& xs, const Shape& shape, int64_t slices, accumulate_t<T>* sums, cudaStream_t stream) {
  const int64_t samples = slices * shape.samples * xs.count;
  if (shape.channels_last) {
    return with_vector<T>(fits_vectors(xs, shape.channels), [&](auto v) {
      return launch(pool_columns_kernel<T, v()>, samples, kThreads, 0, 0, stream, xs, shape, slices, sums);
    });
  }
  return with_vector<T>(fits_vectors(xs, shape.space), [&](auto v) {
    const int64_t blocks = ceil_div(samples * shape.channels, kWarps);
    return launch(pool_rows_kernel<T, v()>, blocks, kThreads, 0, 0, stream, xs, shape, slices, sums);
  });
}

#define INSTANTIATE(T) \
  template cudaError_t pool<T>(const Paths<const T>&, const Shape&, int64_t, accumulate_t<T>*, cudaStream_t);
FASTROUTE_FOR_TYPES(INSTANTIATE)

}  // namespace fastroute::cuda
