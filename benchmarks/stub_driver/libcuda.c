// A stub CUDA driver: it loads every module, launches nothing, and keeps the requested launches. The real launchers of Triton and
// of csrc/triton run on it, to measure their time and to check their arguments.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { kMostLaunches = 256, kMostArguments = 128, kMostFunctions = 512 };

typedef struct {
  void* function;
  unsigned grid[3], block[3], shared, attributes;
  uint64_t arguments[kMostArguments];
} Launch;

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} Config;

static Launch launches[kMostLaunches];
static int launch_count, keeping;
static char functions[kMostFunctions];  // a function handle is the address of its byte
static int argument_counts[kMostFunctions], function_count;

// For tests: start keeping launches, and read them.
void stub_keep(int keep) { keeping = keep, launch_count = 0; }
int stub_launch_count(void) { return launch_count; }
const Launch* stub_launch(int index) { return &launches[index]; }
void stub_set_argument_count(void* function, int count) { argument_counts[(char*)function - functions] = count; }

int cuLaunchKernelEx(const Config* config, void* function, void** arguments, void** extra) {
  if (!keeping || launch_count == kMostLaunches) return 0;
  Launch* launch = &launches[launch_count++];
  launch->function = function;
  memcpy(launch->grid, config->grid, sizeof launch->grid);
  memcpy(launch->block, config->block, sizeof launch->block);
  launch->shared = config->shared;
  launch->attributes = config->attribute_count;
  const int count = argument_counts[(char*)function - functions];
  for (int i = 0; i < count; ++i) memcpy(&launch->arguments[i], arguments[i], 8);
  return 0;
}

int cuModuleLoadData(void** module, const void* image) { return *module = functions, 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = &functions[function_count++ % kMostFunctions];
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // threads per block
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 227 << 10, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = functions, 0; }
int cuCtxGetCurrent(void** context) { return *context = functions, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) { return *(uint64_t*)data = pointer, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "an error of the stub", 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, 0; }
