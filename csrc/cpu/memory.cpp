#include "cpu/memory.h"

#include "build.h"
#include "paths.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastroute {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace {

constexpr size_t kPage = size_t{4} << 10, kHugePage = size_t{2} << 20;

// Size from which glibc maps memory from the system; smaller blocks come from its heap.
constexpr size_t kLeastBytes = size_t{128} << 10;

struct Block {
  void* data;
  size_t size;
};

// Null if the system has no memory.
void* map_fresh(size_t size) {
  const size_t reserved = size + kHugePage;
  void* from = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (from == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(from), data = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (data > begin) munmap(from, data - begin);
  munmap(reinterpret_cast<void*>(data + size), begin + reserved - data - size);
  if (size >= kHugePage) madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(data);
}

// Keeps freed blocks for the next block of the same size, and unmaps the oldest beyond a limit. The limit is kKeptBytes, or more
// while kept and used bytes together are at most kSpare times the most that was used lately: a training step then finds all
// blocks of the step before. The spare is needed because maps of different sizes are in use at different times of a step.
class Pool {
 public:
  Block take(size_t size) {
    std::vector<Block> evicted;
    Block taken{nullptr, size};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.end(); block != free_.begin();) {  // the block freed last is most likely in cache
        if ((--block)->size != size) continue;
        taken = *block;
        free_.erase(block);
        kept_ -= size;
        break;
      }
      used_ += size;
      if (++taken_ == kWindow) {
        taken_ = 0;
        most_before_ = std::exchange(most_, 0);
      }
      most_ = std::max(most_, used_);
      evicted = evict();
    }
    unmap(evicted);
    if (!taken.data) taken.data = map_fresh(size);
    if (!taken.data) {  // the system has no memory
      release();
      taken.data = map_fresh(size);
    }
    if (!taken.data) {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ -= size;
    }
    return taken;
  }

  void give(Block block) {
    std::vector<Block> evicted;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(block);
      kept_ += block.size;
      used_ -= block.size;
      evicted = evict();
    }
    unmap(evicted);
  }

 private:
  // Takes out the blocks that were freed first, until what is kept is within its limit.
  std::vector<Block> evict() {
    const auto most = static_cast<size_t>(kSpare * static_cast<double>(std::max(most_, most_before_)));
    const size_t limit = std::max(kKeptBytes, most - std::min(most, used_));
    auto last = free_.begin();
    for (; kept_ > limit; ++last) kept_ -= last->size;
    std::vector<Block> evicted(free_.begin(), last);
    free_.erase(free_.begin(), last);
    return evicted;
  }

  // Unmaps all kept blocks.
  void release() {
    std::vector<Block> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks = std::exchange(free_, {});
      kept_ = 0;
    }
    unmap(blocks);
  }

  static void unmap(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) munmap(block.data, block.size);
  }

  static constexpr double kSpare = 1.25;
  static constexpr int64_t kWindow = 4096;  // "lately" is one to two times as many blocks, more than any step takes

  std::mutex mutex_;
  std::vector<Block> free_;  // in order of release
  size_t kept_ = 0, used_ = 0;
  size_t most_ = 0, most_before_ = 0;  // the most in use in this window, and in the one before
  int64_t taken_ = 0;  // in this window
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive static objects
  return *instance;
}

void give_back(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  pool().give(*block);
}

}  // namespace

at::Tensor allocate(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  const auto negative = [](at::IntArrayRef values) {
    return std::any_of(values.begin(), values.end(), [](int64_t value) { return value < 0; });
  };
  TORCH_CHECK(!negative(sizes) && !negative(strides), "sizes ", sizes, " and strides ", strides, " must not be negative");
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, x.element_size());
  const size_t size = (bytes + kPage - 1) / kPage * kPage;
  const auto& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (size < kLeastBytes || filled) return at::empty_strided(sizes, strides, x.options());
  const Block block = pool().take(size);
  if (!block.data) return at::empty_strided(sizes, strides, x.options());
  at::DataPtr data(block.data, new Block(block), &give_back, at::kCPU);
  at::Tensor tensor = at::empty({0}, x.options());
  const c10::Storage storage(
      c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes), std::move(data), c10::GetCPUAllocator(), true);
  tensor.set_(storage, 0, sizes, strides);
  return tensor;
}

#else

at::Tensor allocate(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::empty_strided(sizes, strides, x.options());
}

#endif

std::vector<at::Tensor> allocate_paths(const at::Tensor& x, int64_t count) {
  const std::vector<int64_t> strides = path_strides(x);
  std::vector<at::Tensor> paths;
  paths.reserve(count);
  for (int64_t i = 0; i < count; ++i) paths.push_back(allocate(x, x.sizes(), strides));
  return paths;
}

}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("new_empty_strided", &fastroute::allocate);
}
