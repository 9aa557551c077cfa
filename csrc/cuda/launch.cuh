// Launches, and dispatch to the instantiations of a kernel.

#pragma once

#include "cuda/types.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

namespace fastroute::cuda {

// Allows a kernel all the dynamic shared memory of a block of the current device. Set once per device: if each call set its own
// limit, a thread could lower it between another thread's setting and launch.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device, most;
  cudaFuncAttributes attributes;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  if (allowed.count({device, kernel})) return cudaSuccess;
  auto error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  most -= static_cast<int>(attributes.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.emplace(device, kernel);
  return error;
}

// A launch of blocks in clusters, or without clusters if `cluster` is 0. `shared` is the dynamic shared memory in bytes.
struct Configuration {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Configuration(int64_t blocks, int threads, int64_t shared, int cluster, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    if (cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  Configuration(const Configuration&) = delete;  // config points to attribute
};

template <typename... P, typename... A>
cudaError_t launch(
    void (*kernel)(P...), int64_t blocks, int threads, int64_t shared, int cluster, cudaStream_t stream, A... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024) {
    const auto error = allow_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  const Configuration launched(blocks, threads, shared, cluster, stream);
  return cudaLaunchKernelEx(&launched.config, kernel, args...);
}

// Number of clusters that the current device runs at once. Asked once for each kernel and size.
template <typename... P>
cudaError_t clusters_at_once(void (*kernel)(P...), int threads, int64_t shared, int cluster, int* count) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int64_t, int>, int> known;
  int device;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::tuple key(device, reinterpret_cast<const void*>(kernel), shared, cluster);
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) {
    *count = found->second;
    return cudaSuccess;
  }
  const auto allowed = allow_shared(reinterpret_cast<const void*>(kernel));
  if (allowed != cudaSuccess) return allowed;
  const Configuration launched(cluster, threads, shared, cluster, nullptr);
  const auto error = cudaOccupancyMaxActiveClusters(count, kernel, &launched.config);
  if (error == cudaSuccess) known.emplace(key, *count);
  return error;
}

// Calls f(integral_constant) with the smallest tile that holds `paths` paths: 2, 4 or 8, few to limit compile time. Surplus
// paths of a tile are neither read nor written.
template <typename F>
cudaError_t with_tile(int paths, F f) {
  if (paths <= 2) return f(std::integral_constant<int, 2>());
  if (paths <= 4) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, 8>());
}

// Calls f(integral_constant) with the elements per access.
template <typename T, typename F>
cudaError_t with_vector(bool fits, F f) {
  if constexpr (kVector<T> > 1) {
    if (fits) return f(std::integral_constant<int, kVector<T>>());
  }
  return f(std::integral_constant<int, 1>());
}

#define FASTROUTE_FOR_TYPES(instantiate) \
  instantiate(float) instantiate(c10::BFloat16) instantiate(c10::Half) instantiate(double)

}  // namespace fastroute::cuda
