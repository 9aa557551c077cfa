// The few things that only the device has: shared memory, warps, clusters and asynchronous copies, in one place.

#ifndef FASTROUTE_CUDA_DEVICE_CUH
#define FASTROUTE_CUDA_DEVICE_CUH

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

// Clusters and distributed shared memory exist from sm_90 on; for older targets the kernels that use them are empty.
#define FASTROUTE_CLUSTERS (__CUDA_ARCH__ >= 900)

namespace fastroute::cuda {

__device__ inline void* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

template <typename A>
__device__ A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// One store of 16 bytes to global memory: left to itself, the compiler may store element by element.
__device__ inline void store_word(void* to, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

// 16 bytes from global to shared memory, past the registers; `copies_wait` waits for those of the calling thread.
__device__ inline void copy_async(void* to, const void* from) { __pipeline_memcpy_async(to, from, 16); }

__device__ inline void copies_wait() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

#if FASTROUTE_CLUSTERS
__device__ inline int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline void cluster_arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
__device__ inline void cluster_wait() { cooperative_groups::cluster_group::barrier_wait(); }

// The address in the block of that rank of what `shared` is in this one.
template <typename A>
__device__ const A* of_rank(const A* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#endif

}  // namespace fastroute::cuda

#endif
