// Launch configurations from sizes and device properties: plain arithmetic, tested without a device.

#pragma once

#include "cuda/types.h"

#include <algorithm>

namespace fastroute::cuda {

struct Device {
  int64_t architecture;  // of the code in use, 90 for sm_90; kernels compiled for older architectures have no clusters
  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor;
};

// Properties of the current device.
const Device& device();

// Pieces in which the next sample lands, the first while the others are still mixed. Eight were up to 8 % slower on an H100.
constexpr int kPieces = 4;

constexpr int64_t kLargestCluster = 8;  // devices with clusters launch this many blocks, if they have 8 multiprocessors

// Shared memory of one block: its share of each held path, in vectors of 16 bytes, a byte for each vector of as many paths as
// have masks, and `extra` for sums and gates.
inline int64_t block_bytes(int64_t paths, int64_t path_bytes, int64_t extra, int64_t cluster, int64_t masks) {
  const int64_t vectors = ceil_div(path_bytes, 16 * cluster);
  return paths * vectors * 16 + ceil_div(masks * vectors, 16) * 16 + extra;
}

// Blocks per sample for the one-read kernels, or 0 for two passes.
//
// The one-read kernels move (m + n) path bytes in the forward and (2m + n) in the backward, the minimum; two passes read m, or
// n, more unless these are still in L2. The one-read kernel therefore runs whenever the held paths fit: on sm_90 in 8 blocks of
// 227 KB, minus sums and gates. For example, two float32 paths of 64 x 56 x 56 take 8 blocks of 196 KB; three do not fit.
//
// The cluster size is the smallest for which two blocks fit on a multiprocessor: while one computes gates and waits for its
// cluster, the other moves bytes. It is doubled while there are at most half as many blocks as multiprocessors and a block
// still has 4 KB of each path, 16 bytes for each of its 256 threads.
inline int64_t choose_cluster(
    int64_t paths, int64_t path_bytes, int64_t extra, int64_t samples, const Device& device, int64_t masks = 0) {
  if (device.architecture < 90 || device.multiprocessors < kLargestCluster) return 0;
  const int64_t half = device.shared_per_multiprocessor / 2 - 1024;  // the system reserves 1 KB per block
  int64_t cluster = 1;
  const auto bytes = [&](int64_t c) { return block_bytes(paths, path_bytes, extra, c, masks); };
  while (cluster < kLargestCluster && bytes(cluster) > half) cluster *= 2;
  if (bytes(cluster) > device.shared_per_block) return 0;
  while (cluster < kLargestCluster && 2 * cluster * samples <= device.multiprocessors &&
         path_bytes >= 4096 * 2 * cluster) {
    cluster *= 2;
  }
  return cluster;
}

// Shared memory of one block in addition to the paths: barriers of the copies, sums, gates, and scratch for the column sums of
// channels_last. `vector`: elements in 16 bytes.
inline int64_t float_bytes(int64_t count) { return ceil_div(4 * count, 16) * 16; }

inline int64_t cluster_forward_extra(const Shape& shape, int64_t m, int64_t n, int64_t hidden, int64_t vector) {
  return float_bytes(2 * kPieces * m) + 2 * float_bytes(m * shape.channels) + float_bytes(m * hidden) + 2 * float_bytes(m * n) +
      (shape.channels_last ? float_bytes(kThreads * vector) : 0);
}

inline int64_t cluster_backward_extra(const Shape& shape, int64_t m, int64_t n, int64_t hidden) {
  return float_bytes(2 * kPieces * n) + float_bytes(kWarps * m * n) + 6 * float_bytes(m * n) + 2 * float_bytes(m * hidden) +
      float_bytes(m * shape.channels);
}

// Blocks per sample with which a one-read kernel supports paths of this shape, or 0 if it does not. Addresses and batch strides
// of paths must also be multiples of 16 bytes. Without dX, a two-pass backward reads no more than this one.
inline int64_t forward_cluster(
    const Shape& shape, int64_t m, int64_t n, int64_t hidden, int64_t element_bytes, const Device& device) {
  const int64_t path_bytes = shape.elements() * element_bytes;
  if (element_bytes > 4 || path_bytes % 16 != 0) return 0;
  const int64_t extra = cluster_forward_extra(shape, m, n, hidden, 16 / element_bytes);
  return choose_cluster(m, path_bytes, extra, shape.samples, device);
}

inline int64_t backward_cluster(
    const Shape& shape, int64_t m, int64_t n, int64_t hidden, int64_t element_bytes, const Device& device, bool relu) {
  const int64_t path_bytes = shape.elements() * element_bytes;
  if (element_bytes > 4 || path_bytes % 16 != 0) return 0;
  return choose_cluster(n, path_bytes, cluster_backward_extra(shape, m, n, hidden), shape.samples, device, relu ? m : 0);
}

// Returns whether a block of the one-read kernels that needs `bytes` also holds a copy of the gates' parameters: if that does
// not reduce the number of blocks per multiprocessor, up to the desired two.
inline bool holds_gate(int64_t bytes, int64_t gate, const Device& device) {
  const auto blocks = [&](int64_t b) { return std::min<int64_t>(2, device.shared_per_multiprocessor / (b + 1024)); };
  return bytes + gate <= device.shared_per_block && blocks(bytes + gate) == blocks(bytes);
}

// Number of slices of each of `tasks`, so that `wanted` blocks or warps are at work and no slice has less than `least` of the
// `work` of a task.
inline int64_t choose_slices(int64_t tasks, int64_t wanted, int64_t work, int64_t least) {
  return std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(tasks, 1)), 1, std::max<int64_t>(work / least, 1));
}

}  // namespace fastroute::cuda
