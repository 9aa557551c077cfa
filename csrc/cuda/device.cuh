// Device-only primitives: shared memory, warps, clusters and asynchronous copies.

#ifndef FASTROUTE_CUDA_DEVICE_CUH
#define FASTROUTE_CUDA_DEVICE_CUH

#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>

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

// One store of 16 bytes to global memory; otherwise the compiler may store element by element.
__device__ inline void store_word(void* to, uint4 word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

// max(x, 0) of one float32, of two bfloat16 or of two float16; keeps NaN.
__device__ inline uint32_t positive_f32(uint32_t x) {
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+r"(x));
  return x;
}
__device__ inline uint32_t positive_bf16(uint32_t x) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(0));
  return x;
}
__device__ inline uint32_t positive_f16(uint32_t x) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(0));
  return x;
}

// Copies 4, 8 or 16 bytes from global to shared memory, bypassing registers; `copies_wait` waits for those of this thread.
template <int BYTES>
__device__ void copy_async(void* to, const void* from) {
  __pipeline_memcpy_async(to, from, BYTES);
}

__device__ inline void copies_wait() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

#if FASTROUTE_CLUSTERS
__device__ inline int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline void cluster_arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
__device__ inline void cluster_wait() { cooperative_groups::cluster_group::barrier_wait(); }

// Bulk copies, of a multiple of 16 bytes at 16-byte aligned addresses, by the copy engine of the multiprocessor for one thread.
// `landing` is a barrier in shared memory that counts their bytes, in one phase after another. One thread initialises it, and
// names the bytes of a phase before it copies them. Once initialised for all threads, by a barrier of the block, `land_wait`
// blocks a thread until all bytes of a phase have arrived and are visible. `phase` is 0 or 1, in turns.
__device__ inline void land_init(uint64_t* landing) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(landing));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void land_begin(uint64_t* landing, uint32_t bytes) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(landing));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

__device__ inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* landing) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(static_cast<uint32_t>(__cvta_generic_to_shared(landing)))
      : "memory");
}

__device__ inline void land_wait(uint64_t* landing, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred landed;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 landed, [%0], %1;\n"
      "@!landed bra again;\n"
      "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(landing))), "r"(phase)
      : "memory");
}

// Orders this thread's accesses to shared memory before bulk copies that another thread starts after a barrier.
__device__ inline void release_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Address of `shared` in the block of that rank.
template <typename A>
__device__ const A* of_rank(const A* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#endif

}  // namespace fastroute::cuda

#endif
