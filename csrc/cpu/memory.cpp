#include "cpu/memory.h"

#include "paths.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

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

// What glibc maps from the system by itself. Less than this comes from its heap.
constexpr size_t kLeastBytes = size_t{128} << 10;

struct Block {
  void* data;
  size_t size;
};

// Null where the system has none.
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

class Pool {
 public:
  Block take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = free_.end(); block != free_.begin();) {  // the last one freed is most likely in a cache
        if ((--block)->size != size) continue;
        const Block taken = *block;
        free_.erase(block);
        kept_ -= size;
        return taken;
      }
    }
    return {map_fresh(size), size};
  }

  void give(Block block) {
    if (block.size > kKeptBytes) {
      munmap(block.data, block.size);
      return;
    }
    std::vector<Block> oldest;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(block);
      kept_ += block.size;
      auto last = free_.begin();
      for (; kept_ > kKeptBytes; ++last) kept_ -= last->size;
      oldest.assign(free_.begin(), last);
      free_.erase(free_.begin(), last);
    }
    for (const Block& old : oldest) munmap(old.data, old.size);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;  // in the order in which they were freed
  size_t kept_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: tensors may outlive what is static
  return *instance;
}

void give_back(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  pool().give(*block);
}

at::Tensor allocate_path(const at::Tensor& x) {
  const size_t bytes = x.numel() * x.element_size(), size = (bytes + kPage - 1) / kPage * kPage;
  const auto& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (size < kLeastBytes || filled) return empty_path(x);
  const Block block = pool().take(size);
  if (!block.data) return empty_path(x);
  at::DataPtr data(block.data, new Block(block), &give_back, at::kCPU);
  at::Tensor path = at::empty({0}, x.options());
  const c10::Storage storage(
      c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes), std::move(data), c10::GetCPUAllocator(), true);
  path.set_(storage, 0, x.sizes(), path_strides(x));
  return path;
}

}  // namespace

void on_huge_pages(at::TensorList paths) {
  for (const at::Tensor& path : paths) {
    const auto data = reinterpret_cast<uintptr_t>(path.mutable_data_ptr());
    const uintptr_t begin = (data + kPage - 1) / kPage * kPage, end = (data + path.nbytes()) / kPage * kPage;
    if (path.nbytes() >= kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
}

std::vector<at::Tensor> allocate_paths(const at::Tensor& x, int64_t count) {
  std::vector<at::Tensor> paths;
  paths.reserve(count);
  for (int64_t i = 0; i < count; ++i) paths.push_back(allocate_path(x));
  return paths;
}

#else

void on_huge_pages(at::TensorList paths) {}

std::vector<at::Tensor> allocate_paths(const at::Tensor& x, int64_t count) {
  return empty_paths(x, count);
}

#endif

}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("on_huge_pages", &fastroute::on_huge_pages);
}
