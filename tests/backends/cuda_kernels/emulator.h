// Runs CUDA kernels on the CPU, for tests where there is no card. Included ahead of every source of csrc/cuda, it stands
// for the toolkit's headers and for csrc/cuda/device.cuh.
//
// Each thread is a fiber that runs to its next barrier, and each block as far as it can without the others of its
// cluster, in ascending, descending or shuffled order, so that a missing barrier changes results. Asynchronous copies
// happen as late as they may, those in bulk when nothing else of the block can go on, or with shuffled threads at once.
// Dynamic shared memory is NaN before a block runs and again when it is gone. A write past its end is an error, and so are
// threads that wait for each other, or for a copy, in vain, and a copy to where a thread has read without a fence since. It
// shows nothing of speed, nor else of the memory ordering of a device.

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
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <utility>
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
  size_t sharedSizeBytes;
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

enum class State { kReady, kWarp, kBlock, kLanding, kCluster, kDone };

// Bulk copies of the present phase on their way, and the bytes that they must have in all.
struct Landing {
  bool open = false;
  uint32_t bytes = 0, begun = 0, phases = 0;  // phases that have landed
  std::vector<std::tuple<void*, const void*, uint32_t>> copies;
};

struct Block {
  unsigned index, rank;
  size_t bytes;  // of shared memory, which a guard follows
  std::vector<uint4> shared;
  std::map<const uint64_t*, Landing> landings;

  bool has(const void* address, size_t bytes, size_t alignment) const {
    const auto begin = reinterpret_cast<uintptr_t>(shared.data()), at = reinterpret_cast<uintptr_t>(address);
    return at % alignment == 0 && at >= begin && at + bytes <= begin + this->bytes;
  }
};

// A thread of a block, and when that is done, of the next: a context is made once, since that takes calls to the system.
struct Fiber {
  State state = State::kDone;
  bool started = false;
  unsigned thread;
  Block* block;
  Landing* landing;  // that this thread waits for
  uint32_t phase;
  bool released;  // what it has read of shared memory to bulk copies
  int arrived;  // how many of the cluster's barriers this thread has arrived at
  std::vector<std::tuple<void*, const void*, int>> copies;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
};

inline constexpr size_t kStack = 256 * 1024, kGuard = 1024;
inline bool idle = false;  // launches are counted, and nothing runs
inline int64_t launches = 0;
inline int order = 0;  // 0: ascending, 1: descending, 2 and more: shuffled
inline std::vector<Fiber> pool;
inline std::span<Fiber> fibers;  // those of the pool that the launch uses
inline std::vector<Block> blocks;
inline unsigned threads, cluster;
inline Fiber* now;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::map<const void*, size_t> shared_limits;  // of the kernels that may have more than 48 KB
alignas(16) inline char lanes[64][32][8];  // what a warp shuffles

inline void pause(State state) {
  now->state = state;
  if (!_setjmp(now->here)) _longjmp(scheduler, 1);
}

inline std::string failure;  // of a kernel, to be thrown where there is a stack for it

inline void require(bool holds, const char* otherwise) {
  if (holds) return;
  failure = otherwise;
  pause(State::kDone);
}

inline void enter() {
  for (;;) {
    body();
    pause(State::kDone);
  }
}

inline void run(Fiber& fiber) {
  now = &fiber;
  fiber.state = State::kReady;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, enter, 0);
  setcontext(&start);
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

// Lands the copies that threads of [begin, end) wait for, if all have begun, and lets these threads go on.
inline bool land(unsigned begin, unsigned end) {
  bool any = false;
  for (unsigned f = begin; f < end; ++f) {
    Landing* landing = fibers[f].landing;
    if (fibers[f].state != State::kLanding) continue;
    if (landing->phases % 2 == fibers[f].phase) {
      if (!landing->open || landing->begun != landing->bytes) continue;
      for (const auto& [to, from, bytes] : landing->copies) std::memcpy(to, from, bytes);
      landing->copies.clear();
      landing->open = false;
      landing->begun = 0;
      ++landing->phases;
    }
    any = true;
    fibers[f].state = State::kReady;
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
    moved = moved || land(first, first + threads);
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
      TORCH_CHECK(failure.empty(), std::exchange(failure, {}));
      if (std::all_of(first, first + threads, done)) {
        for (const auto& [_, landing] : blocks[rank].landings) {
          TORCH_CHECK(!landing.open || !landing.bytes, "a block has gone before what it copies has landed");
        }
        auto& shared = blocks[rank].shared;
        const auto* bytes = reinterpret_cast<const unsigned char*>(shared.data());
        TORCH_CHECK(
            std::all_of(bytes + blocks[rank].bytes, bytes + shared.size() * sizeof(uint4), [](auto b) { return b == 0xff; }),
            "a block writes past the end of its shared memory");
        std::memset(shared.data(), 0xff, shared.size() * sizeof(uint4));
      }
    }
    moved |= release_cluster();
    TORCH_CHECK(moved, "threads of a kernel wait for each other in vain");
  }
}

inline void launch(const cudaLaunchConfig_t& config, const void* address, std::function<void()> kernel) {
  const auto limit = shared_limits.find(address);
  TORCH_CHECK(
      config.dynamicSmemBytes <= (limit == shared_limits.end() ? 48 * 1024 : limit->second),
      "the kernel was not allowed ", config.dynamicSmemBytes, " bytes of shared memory");
  threads = config.blockDim.x;
  cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  body = std::move(kernel);
  TORCH_CHECK(config.gridDim.x % cluster == 0 && threads % 32 == 0);
  if (pool.size() < threads * cluster) pool.resize(threads * cluster);
  fibers = std::span(pool).first(threads * cluster);
  for (unsigned index = 0; index < config.gridDim.x; index += cluster) {
    blocks.clear();
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const size_t bytes = config.dynamicSmemBytes, with_guard = (bytes + 15) / 16 * 16 + kGuard;
      blocks.push_back({index + rank, rank, bytes, std::vector<uint4>(with_guard / sizeof(uint4))});
      std::memset(blocks.back().shared.data(), 0xff, with_guard);
    }
    for (unsigned f = 0; f < fibers.size(); ++f) {
      Fiber& fiber = fibers[f];
      fiber.thread = f % threads;
      fiber.block = &blocks[f / threads];
      fiber.state = State::kReady;
      fiber.arrived = 0;
      fiber.released = false;
      fiber.copies.clear();
    }
    try {
      run_cluster();
    } catch (...) {
      pool.clear();  // threads are left within their bodies
      throw;
    }
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
  ++emulator::launches;
  if (emulator::idle) return cudaSuccess;
  emulator::launch(*config, reinterpret_cast<const void*>(kernel), [=] { kernel(args...); });
  return cudaSuccess;
}

// Two: with three samples, a cluster takes more than one.
template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, void (*)(P...), const cudaLaunchConfig_t*) {
  *count = 2;
  return cudaSuccess;
}

// Once for each kernel: a second value would race with the launches of other threads.
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  TORCH_CHECK(bytes <= 232448 && emulator::shared_limits.emplace(kernel, bytes).second, "set twice, or to too much");
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {90, 0};
  return cudaSuccess;
}

template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
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

// max(x, 0) of the 16-bit or 32-bit numbers in x; keeps NaN.
template <typename T>
uint32_t positive(uint32_t x) {
  T values[4 / sizeof(T)];
  std::memcpy(values, &x, 4);
  for (T& value : values) value = static_cast<float>(value) < 0 ? T(0) : value;
  std::memcpy(&x, values, 4);
  return x;
}
inline uint32_t positive_f32(uint32_t x) { return positive<float>(x); }
inline uint32_t positive_bf16(uint32_t x) { return positive<c10::BFloat16>(x); }
inline uint32_t positive_f16(uint32_t x) { return positive<c10::Half>(x); }

template <int BYTES>
void copy_async(void* to, const void* from) {
  emulator::require(
      emulator::now->block->has(to, BYTES, BYTES) && reinterpret_cast<uintptr_t>(from) % BYTES == 0,
      "a copy is misaligned or outside of shared memory");
  emulator::now->copies.emplace_back(to, from, BYTES);
}

inline void copies_wait() {
  for (const auto& [to, from, bytes] : emulator::now->copies) std::memcpy(to, from, bytes);
  emulator::now->copies.clear();
}

inline void land_init(uint64_t* landing) {
  auto* block = emulator::now->block;
  emulator::require(block->has(landing, 8, 8), "a landing is misaligned or outside of shared memory");
  emulator::require(block->landings.try_emplace(landing).second, "a landing is initialised again");
}

inline emulator::Landing& landing_at(uint64_t* landing) {
  auto& landings = emulator::now->block->landings;
  const auto found = landings.find(landing);
  emulator::require(found != landings.end(), "a landing is used that has not been initialised");
  return found->second;
}

inline void land_begin(uint64_t* landing, uint32_t bytes) {
  auto& known = landing_at(landing);
  emulator::require(!known.open, "a phase of a landing begins before the last has landed");
  known.open = true;
  known.bytes = bytes;
}

// Copies land when they are waited for, or with shuffled threads at once: an access that is not ordered before them is seen then.
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t* landing) {
  auto* block = emulator::now->block;
  emulator::require(
      bytes && bytes % 16 == 0 && block->has(to, bytes, 16) && reinterpret_cast<uintptr_t>(from) % 16 == 0,
      "a copy is empty, misaligned or outside of shared memory");
  auto& known = landing_at(landing);
  emulator::require(known.open, "a copy is to land where no phase has begun");
  const bool released = std::all_of(emulator::fibers.begin(), emulator::fibers.end(), [&](const emulator::Fiber& fiber) {
    return fiber.block != block || fiber.released;
  });
  emulator::require(!known.phases || released, "a copy begins before all threads have released what has landed");
  known.begun += bytes;
  emulator::require(known.begun <= known.bytes, "more bytes are to land than were named");
  if (emulator::order > 1) {
    std::memcpy(to, from, bytes);
  } else {
    known.copies.emplace_back(to, from, bytes);
  }
}

inline void land_wait(uint64_t* landing, uint32_t phase) {
  auto& known = landing_at(landing);
  emulator::now->landing = &known;
  emulator::now->phase = phase;
  emulator::now->released = false;
  if (known.phases % 2 == phase) emulator::pause(emulator::State::kLanding);
}

inline void release_to_copies() { emulator::now->released = true; }

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
