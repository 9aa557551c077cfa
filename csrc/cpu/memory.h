// Memory pool for tensors of the size of a path.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fastroute {

// Same as x.new_empty_strided. Freed blocks of 128 KiB and more are kept for the next tensor of the same size: the system takes
// longer to map and clear fresh memory than routing takes to fill it, and glibc returns freed memory to the system. At
// most kKeptBytes are kept, or more while kept and used bytes together are at most 1.25 times the most that was used lately.
at::Tensor allocate(const at::Tensor& x, at::IntArrayRef sizes, at::IntArrayRef strides);

// Same as empty_paths, from the same pool.
std::vector<at::Tensor> allocate_paths(const at::Tensor& x, int64_t count);

constexpr size_t kKeptBytes = size_t{256} << 20;

}  // namespace fastroute
