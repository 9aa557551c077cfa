// The CUDA driver's launch function, loaded at the first launch: this library is built and loaded without CUDA.

#pragma once

namespace fastroute::triton {

struct Grid {
  unsigned x, y, z, threads, shared;
  bool dependent;  // programmatic dependent launch: may begin before the previous launch ends, and waits for it
};

// Launches a kernel. Returns false without a launch if this thread has no CUDA context yet and `may_fail`; raises on any other
// error.
bool launch_kernel(void* function, const Grid& grid, void* stream, void** arguments, bool may_fail);

}  // namespace fastroute::triton
