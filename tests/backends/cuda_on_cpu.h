// Runs CUDA kernels on the CPU, for tests where there is no card. Included ahead of every source of csrc/cuda, it stands
// for the toolkit's headers and for csrc/cuda/device.cuh.
//
// Each thread is a fiber that runs to its next barrier, and each block as far as it can without the others of its
// cluster, in ascending, descending or shuffled order, so that a missing barrier changes results. Asynchronous copies
// happen as late as they may, dynamic shared memory is NaN before a block runs and again when it is gone, and threads
// that wait for each other in vain are an error. It shows nothing of speed, nor of the memory ordering of a device.

#pragma once
#define FASTROUTE_CUDA_DEVICE_CUH
#define FASTROUTE_CLUSTERS 1

#include <ATen/core/Tensor.h>
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using std::max;
using std::min;

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeNone, cudaLaunchAttributeClusterDimension };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
using cudaStream_t = void*;
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

enum class State { kReady, kWarp, kBlock, kCluster, kDone };

struct Block {
  unsigned index, rank;
  std::vector<uint4> shared;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf here;
  bool started;
  unsigned thread;
  Block* block;
  State state;
  int arrived;  // how many of the cluster's barriers this thread has arrived at
  std::vector<std::pair<void*, const void*>> copies;
};

inline constexpr size_t kStack = 256 * 1024;
inline int order = 0;  // 0: ascending, 1: descending, 2 and more: shuffled
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;
inline unsigned threads, cluster;
inline Fiber* now;
inline jmp_buf scheduler;
inline ucontext_t first_return;
inline std::function<void()> body;
alignas(16) inline char lanes[64][32][8];  // what a warp shuffles

inline void pause(State state) {
  now->state = state;
  if (!_setjmp(now->here)) _longjmp(scheduler, 1);
}

inline void enter() {
  body();
  pause(State::kDone);
}

inline void run(Fiber& fiber) {
  now = &fiber;
  fiber.state = State::kReady;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets go on those of [begin, end) that wait for each other in `state`, if all that still live do.
inline bool release(unsigned begin, unsigned end, State state) {
  bool all = true, any = false;
  for (unsigned f = begin; f < end; ++f) {
    all = all && (fibers[f].state == state || fibers[f].state == State::kDone);
    any = any || fibers[f].state == state;
  }
  if (!all || !any) return false;
  for (unsigned f = begin; f < end; ++f) {
    if (fibers[f].state == state) fibers[f].state = State::kReady;
  }
  return true;
}

inline bool release_cluster() {
  int arrived = INT32_MAX;
  for (const auto& fiber : fibers) arrived = std::min(arrived, fiber.arrived);
  bool any = false;
  for (auto& fiber : fibers) {
    if (fiber.state == State::kCluster && fiber.arrived <= arrived) {
      fiber.state = State::kReady;
      any = true;
    }
  }
  return any;
}

// Lets one block go as far as it can alone; whether it moved at all.
inline bool run_block(unsigned first, const std::vector<unsigned>& turn) {
  bool any = false;
  for (bool moved = true; moved; any |= moved) {
    moved = false;
    for (const unsigned t : turn) {
      if (fibers[first + t].state != State::kReady) continue;
      run(fibers[first + t]);
      moved = true;
    }
    for (unsigned f = first; f < first + threads; f += 32) moved |= release(f, f + 32, State::kWarp);
    moved |= release(first, first + threads, State::kBlock);
  }
  return any;
}

inline std::vector<unsigned> turns(unsigned count) {
  std::vector<unsigned> turn(count);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  if (order > 1) std::shuffle(turn.begin(), turn.end(), std::mt19937(order));
  return turn;
}

inline void run_cluster() {
  const auto block_turn = turns(cluster), thread_turn = turns(threads);
  const auto done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  while (!std::all_of(fibers.begin(), fibers.end(), done)) {
    bool moved = false;
    for (const unsigned rank : block_turn) {
      const auto first = fibers.begin() + rank * threads;
      if (std::all_of(first, first + threads, done)) continue;
      moved |= run_block(rank * threads, thread_turn);
      if (std::all_of(first, first + threads, done)) {
        auto& shared = blocks[rank].shared;
        std::memset(shared.data(), 0xff, shared.size() * sizeof(uint4));
      }
    }
    moved |= release_cluster();
    TORCH_CHECK(moved, "threads of a kernel wait for each other in vain");
  }
}

inline void launch(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  threads = config.blockDim.x;
  cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  body = std::move(kernel);
  TORCH_CHECK(config.gridDim.x % cluster == 0 && threads % 32 == 0 && config.dynamicSmemBytes <= 232448);
  if (fibers.size() < threads * cluster) {
    std::vector<Fiber> more(threads * cluster);
    fibers.swap(more);
  }
  fibers.resize(threads * cluster);
  for (unsigned index = 0; index < config.gridDim.x; index += cluster) {
    blocks.clear();
    for (unsigned rank = 0; rank < cluster; ++rank) {
      blocks.push_back({index + rank, rank, std::vector<uint4>(config.dynamicSmemBytes / sizeof(uint4))});
      std::memset(blocks.back().shared.data(), 0xff, config.dynamicSmemBytes);
    }
    for (unsigned f = 0; f < fibers.size(); ++f) {
      Fiber& fiber = fibers[f];
      if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStack);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, enter, 0);
      fiber.started = false;
      fiber.thread = f % threads;
      fiber.block = &blocks[f / threads];
      fiber.state = State::kReady;
      fiber.arrived = 0;
      fiber.copies.clear();
    }
    run_cluster();
  }
}

}  // namespace emulator

struct Builtin {
  struct {
    unsigned (*value)();
    operator unsigned() const { return value(); }
  } x;
};
inline const Builtin threadIdx{{[] { return emulator::now->thread; }}};
inline const Builtin blockIdx{{[] { return emulator::now->block->index; }}};
inline const Builtin blockDim{{[] { return emulator::threads; }}};

inline void __syncthreads() { emulator::pause(emulator::State::kBlock); }

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... args) {
  emulator::launch(*config, [=] { kernel(args...); });
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

// An H100's.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  constexpr int values[] = {132, 232448, 233472};
  *value = values[which];
  return cudaSuccess;
}

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess)

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return nullptr; }
}  // namespace c10::cuda

namespace fastroute::cuda {

inline void* dynamic_shared() { return emulator::now->block->shared.data(); }

template <typename A>
A shuffle_xor(A value, int mask) {
  auto& warp = emulator::lanes[(emulator::now - emulator::fibers.data()) / 32];
  const unsigned lane = emulator::now->thread % 32;
  std::memcpy(warp[lane], &value, sizeof(A));
  emulator::pause(emulator::State::kWarp);
  std::memcpy(&value, warp[lane ^ mask], sizeof(A));
  emulator::pause(emulator::State::kWarp);
  return value;
}

inline void store_word(void* to, uint4 word) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0);
  *static_cast<uint4*>(to) = word;
}

inline void copy_async(void* to, const void* from) {
  TORCH_CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0);
  emulator::now->copies.emplace_back(to, from);
}

inline void copies_wait() {
  for (const auto& [to, from] : emulator::now->copies) std::memcpy(to, from, 16);
  emulator::now->copies.clear();
}

inline int cluster_size() { return emulator::cluster; }
inline int cluster_rank() { return emulator::now->block->rank; }
inline void cluster_arrive() { ++emulator::now->arrived; }
inline void cluster_wait() { emulator::pause(emulator::State::kCluster); }

template <typename A>
const A* of_rank(const A* shared, int rank) {
  const auto* mine = reinterpret_cast<const char*>(emulator::now->block->shared.data());
  const auto* theirs = reinterpret_cast<const char*>(emulator::blocks[rank].shared.data());
  return reinterpret_cast<const A*>(theirs + (reinterpret_cast<const char*>(shared) - mine));
}

}  // namespace fastroute::cuda
