// Memory for tensors as large as a path.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastroute {

// As x.new_empty_strided. Memory of 128 KiB and more that such tensors leave is kept for the next of the same size, up to
// kKeptBytes in all: the system takes longer to map and clear fresh memory than routing takes to fill it, and glibc hands
// back what is freed.
at::Tensor allocate(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides);

// As empty_paths, from the same memory.
std::vector<at::Tensor> allocate_paths(const at::Tensor& x, int64_t count);

constexpr size_t kKeptBytes = size_t{256} << 20;

}  // namespace fastroute
