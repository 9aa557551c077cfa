// The CUDA driver's launch, found when a kernel is first launched: this library is built and loaded without CUDA.

#pragma once

namespace fastroute::triton {

struct Grid {
  unsigned x, y, z, threads, shared;
  bool dependent;  // may begin before the launch ahead of it has ended, which it then waits for itself
};

// Launches a kernel. False, with nothing launched, where this thread has no CUDA context yet and `may_fail`; raises for any
// other error.
bool launch_kernel(void* function, const Grid& grid, void* stream, void** arguments, bool may_fail);

}  // namespace fastroute::triton
