// Memory for outputs as large as a path.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastroute {

// Asks for huge pages under large tensors that nobody has written yet: memory fresh from the system is mapped page by page
// as it is first written, and with pages of 4 KiB that takes several times as long as the routing itself.
void on_huge_pages(at::TensorList paths);

// As empty_paths. Memory that such tensors leave is kept for the next of the same size, up to kKeptBytes in all: the system
// takes longer to map and clear fresh memory than routing takes to fill it, and glibc hands back what is freed.
std::vector<at::Tensor> allocate_paths(const at::Tensor& x, int64_t count);

constexpr size_t kKeptBytes = size_t{256} << 20;

}  // namespace fastroute
