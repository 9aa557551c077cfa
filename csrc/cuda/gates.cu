// The steps between the passes, with one block per sample, and the gradients of the gates' parameters.

#include "cuda/gate.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace fastroute::cuda {
namespace {

template <typename A>
__global__ void __launch_bounds__(kThreads, 2) gates_forward_kernel(
    const Gate<A> gate, const Shape shape, int64_t slices, const A* sums, A* pooled, A* hidden, A* scores, A* gates) {
  const int64_t s = blockIdx.x, width = gate.m * shape.channels;
  for (int64_t r = threadIdx.x; r < width; r += kThreads) {
    A sum = 0;
#pragma unroll 8
    for (int64_t slice = 0; slice < slices; ++slice) sum += sums[(slice * shape.samples + s) * width + r];
    pooled[s * width + r] = sum / static_cast<A>(shape.space);  // Eq. 3.3
  }
  __syncthreads();
  const int64_t mn = gate.m * gate.n;
  gate_forward(gate, pooled + s * width, hidden + s * gate.m * gate.hidden, scores + s * mn, gates + s * mn);
}

template <typename A>
__global__ void __launch_bounds__(kThreads, 2) gates_backward_kernel(
    const Gate<A> gate, const Shape shape, int64_t slices, const A* products, const A* grad_gates,
    const A* grad_scores, const A* gates, const A* hidden, A* d_scores, A* d_hidden, A* shares) {
  __shared__ A d_gates[kMaxPaths * kMaxPaths];
  const int64_t s = blockIdx.x, mn = gate.m * gate.n;
  for (int64_t r = threadIdx.x / 32; r < mn; r += kWarps) {
    A sum = 0;
    for (int64_t slice = threadIdx.x % 32; slice < slices; slice += 32) {
      sum += products[(slice * shape.samples + s) * mn + r];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) d_gates[r] = sum + (grad_gates ? grad_gates[s * mn + r] : A(0));  // Eq. 3.10
  }
  __syncthreads();
  const int64_t h = s * gate.m * gate.hidden;
  gate_backward(
      gate, shape.space, gates + s * mn, hidden + h, d_gates, grad_scores ? grad_scores + s * mn : nullptr,
      d_scores + s * mn, d_hidden + h, shares ? shares + s * gate.m * shape.channels : nullptr);
}

constexpr int kColumns = 32, kGroups = 32;  // a block sums 32 values, each over 32 groups of samples

template <typename A>
__global__ void __launch_bounds__(kColumns* kGroups, 1)
    outer_sums_kernel(const __grid_constant__ OuterSums<A> sums, int64_t samples) {
  __shared__ A scratch[kGroups][kColumns];
  int64_t block = blockIdx.x;
  int j = 0;
  for (; j + 1 < sums.count; ++j) {
    const int64_t blocks = ceil_div(sums.jobs[j].m * sums.jobs[j].rows * sums.jobs[j].columns, kColumns);
    if (block < blocks) break;
    block -= blocks;
  }
  const OuterSum<A>& job = sums.jobs[j];
  const int64_t lefts = job.m * job.rows, rights = job.m * job.columns;
  const int column = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const int64_t o = block * kColumns + column;
  A sum = 0;
  if (o < lefts * job.columns) {
    const Division k(o, job.columns), r(k.quotient, job.rows);
    const A *left = job.left + k.quotient, *right = job.right + r.quotient * job.columns + k.remainder;
#pragma unroll 4
    for (int64_t s = group; s < samples; s += kGroups) {
      sum += job.right ? left[s * lefts] * right[s * rights] : left[s * lefts];
    }
  }
  scratch[group][column] = sum;
  __syncthreads();
#pragma unroll
  for (int half = kGroups / 2; half; half /= 2) {
    if (group < half) scratch[group][column] += scratch[group + half][column];
    __syncthreads();
  }
  if (group == 0 && o < lefts * job.columns) job.out[o] = scratch[0][column];
}

}  // namespace

template <typename A>
cudaError_t gates_forward(
    const Gate<A>& gate, const Shape& shape, int64_t slices, const A* sums, A* pooled, A* hidden, A* scores, A* gates,
    cudaStream_t stream) {
  return launch(
      gates_forward_kernel<A>, shape.samples, kThreads, 0, 0, stream, gate, shape, slices, sums, pooled, hidden, scores,
      gates);
}

template <typename A>
cudaError_t gates_backward(
    const Gate<A>& gate, const Shape& shape, int64_t slices, const A* products, const A* grad_gates,
    const A* grad_scores, const A* gates, const A* hidden, A* d_scores, A* d_hidden, A* shares, cudaStream_t stream) {
  return launch(
      gates_backward_kernel<A>, shape.samples, kThreads, 0, 0, stream, gate, shape, slices, products, grad_gates,
      grad_scores, gates, hidden, d_scores, d_hidden, shares);
}

template <typename A>
cudaError_t outer_sums(const OuterSums<A>& sums, int64_t samples, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int j = 0; j < sums.count; ++j) {
    blocks += ceil_div(sums.jobs[j].m * sums.jobs[j].rows * sums.jobs[j].columns, kColumns);
  }
  return launch(outer_sums_kernel<A>, blocks, kColumns * kGroups, 0, 0, stream, sums, samples);
}

#define INSTANTIATE(A)                                                                                               \
  template cudaError_t gates_forward<A>(                                                                             \
      const Gate<A>&, const Shape&, int64_t, const A*, A*, A*, A*, A*, cudaStream_t);                                \
  template cudaError_t gates_backward<A>(                                                                            \
      const Gate<A>&, const Shape&, int64_t, const A*, const A*, const A*, const A*, const A*, A*, A*, A*, cudaStream_t); \
  template cudaError_t outer_sums<A>(const OuterSums<A>&, int64_t, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastroute::cuda
