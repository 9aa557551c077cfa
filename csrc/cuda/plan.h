// How a launch is cut up, from sizes and device properties alone: plain arithmetic, tested without a device.

#pragma once

#include "cuda/types.h"

#include <algorithm>

namespace fastroute::cuda {

struct Device {
  int64_t architecture;  // of the code in use, 90 for sm_90: kernels compiled for less have no clusters
  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor;
};

constexpr int64_t kLargestCluster = 8;  // the most that every device with clusters can launch

// Shared memory of one block: its share of each held path, in vectors of 16 bytes, and `extra` for sums and gates.
inline int64_t block_bytes(int64_t paths, int64_t path_bytes, int64_t extra, int64_t cluster) {
  return paths * ceil_div(path_bytes, 16 * cluster) * 16 + extra;
}

// Blocks to a sample for the one-read kernels, or 0 for two passes.
//
// The one-read kernels move (m + n) path bytes forward and (2m + n) backward, the floor; two passes read m, or n, more
// unless these still lie in L2. So the one-read kernel runs wherever the held paths fit: in 8 blocks of 227 KB, on
// sm_90, less sums and gates. For example, two float32 paths of 64 x 56 x 56 take 8 blocks of 196 KB; three do not fit.
//
// Among cluster sizes, the smallest whose blocks lie two to a multiprocessor: while one computes gates and waits for its
// cluster, the other moves bytes. Then wider while there are no more than half as many blocks as multiprocessors and a
// block would still have 4 KB of each path, 16 bytes for each of its 256 threads.
inline int64_t choose_cluster(
    int64_t paths, int64_t path_bytes, int64_t extra, int64_t samples, const Device& device) {
  if (device.architecture < 90) return 0;
  const int64_t half = device.shared_per_multiprocessor / 2 - 1024;  // the system keeps 1 KB for each block
  int64_t cluster = 1;
  while (cluster < kLargestCluster && block_bytes(paths, path_bytes, extra, cluster) > half) cluster *= 2;
  if (block_bytes(paths, path_bytes, extra, cluster) > device.shared_per_block) return 0;
  while (cluster < kLargestCluster && 2 * cluster * samples <= device.multiprocessors &&
         path_bytes >= 4096 * 2 * cluster) {
    cluster *= 2;
  }
  return cluster;
}

// Into how many slices to cut each of `tasks` so that `wanted` blocks or warps are at work, no slice with less than
// `least` of the `work` of a task.
inline int64_t choose_slices(int64_t tasks, int64_t wanted, int64_t work, int64_t least) {
  return std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(tasks, 1)), 1, std::max<int64_t>(work / least, 1));
}

}  // namespace fastroute::cuda
