#include "triton/driver.h"

#include <c10/util/Exception.h>

#include <dlfcn.h>

namespace fastroute::triton {
namespace {

// From cuda.h, so that this library builds without CUDA.
using Result = int;
constexpr Result kSuccess = 0, kInvalidContext = 201;

struct LaunchAttribute {
  int id;
  int pad;
  union {
    char bytes[64];
    int programmatic_stream_serialization;
  } value;
};
constexpr int kProgrammaticStreamSerialization = 6;

struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Driver {
  Result (*launch)(const LaunchConfig*, void* function, void** arguments, void** extra) = nullptr;
  Result (*error_string)(Result, const char**) = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(library, "the CUDA driver's library cannot be loaded: ", dlerror());
    launch = reinterpret_cast<decltype(launch)>(dlsym(library, "cuLaunchKernelEx"));
    error_string = reinterpret_cast<decltype(error_string)>(dlsym(library, "cuGetErrorString"));
    TORCH_CHECK(launch && error_string, "the CUDA driver has no cuLaunchKernelEx; update it to CUDA 12 or newer");
  }
};

}  // namespace

bool launch_kernel(void* function, const Grid& grid, void* stream, void** arguments, bool may_fail) {
  static const Driver driver;
  LaunchAttribute dependent{kProgrammaticStreamSerialization, 0, {}};
  dependent.value.programmatic_stream_serialization = 1;
  const LaunchConfig config{grid.x, grid.y, grid.z, grid.threads, 1, 1, grid.shared, stream,
                            &dependent, grid.dependent ? 1u : 0u};
  const Result result = driver.launch(&config, function, arguments, nullptr);
  if (result == kSuccess) return true;
  if (result == kInvalidContext && may_fail) return false;
  const char* text = nullptr;
  driver.error_string(result, &text);
  TORCH_CHECK(false, "launching a Triton kernel failed with CUDA error ", result, ": ", text ? text : "unknown");
}

}  // namespace fastroute::triton
