#include "ops/route.h"

#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>

namespace fastroute {
namespace {

constexpr int64_t kNativeServes = 1, kTritonServes = 2, kHasClusters = 4;  // flags returned by fastroute_python::choose
constexpr int8_t kUnknown = -1;

std::mutex naming;
std::string named;  // backend named by use_backend; empty for none
std::atomic<bool> anything_named{false}, native_named{false};

// Cached flags by device and type, until another backend is named: for the CPU, then for each CUDA device.
constexpr int kDevices = 65, kTypes = 4;
std::atomic<int8_t> answers[kDevices][kTypes];
std::atomic<uint64_t> namings{0};  // counts the times that answers were forgotten

void forget() {
  ++namings;
  for (auto& device : answers) {
    for (auto& answer : device) answer = kUnknown;
  }
}

int device_index(at::Device device) {
  return device.is_cpu() ? 0 : device.is_cuda() && device.index() + 1 < kDevices ? device.index() + 1 : -1;
}

void name_backend(const std::string& name) {
  const std::lock_guard lock(naming);
  named = name;
  native_named = name == "native";
  anything_named = !name.empty();
  forget();
}

int type_index(at::ScalarType type) {
  return type == at::kFloat ? 0 : type == at::kBFloat16 ? 1 : type == at::kHalf ? 2 : 3;
}

int64_t ask(const at::Tensor& x) {
  static const auto choose = find_operator<int64_t(const at::Tensor&)>("fastroute_python::choose");
  return choose.call(x);
}

// Returns whether the CPU kernels have been loaded.
bool cpu_kernels() {
  static const bool loaded = [] {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fastroute_native::mix", "");
    return op.hasKernelForDispatchKey(c10::DispatchKey::CPU);
  }();
  return loaded;
}

int64_t backends_for(const at::Tensor& x) {
  const char* variable = std::getenv("FASTROUTE_BACKEND");
  const bool in_environment = variable && *variable;
  const bool open = !anything_named.load(std::memory_order_relaxed) && !in_environment;
  if (x.is_cpu() && (open || native_named.load(std::memory_order_relaxed)) && cpu_kernels()) return kNativeServes;
  const int device = device_index(x.device());
  if (device < 0 || in_environment) return ask(x);
  auto& answer = answers[device][type_index(x.scalar_type())];
  int8_t known = answer.load(std::memory_order_relaxed);
  if (known == kUnknown) {
    const uint64_t before = namings;
    known = static_cast<int8_t>(ask(x));  // may take seconds, in which another thread may name a backend
    const std::lock_guard lock(naming);
    if (namings == before) answer = known;
  }
  return known;
}

const bool forgotten = (forget(), true);

}  // namespace

Way way(const at::Tensor& x, First first) {
  const int64_t backends = backends_for(x);
  const bool native = backends & kNativeServes, triton = backends & kTritonServes;
  if (!native && !triton) return Way::kPython;
  if (native != triton) return native ? Way::kNative : Way::kTriton;
  const bool native_first = first == First::kNative || (first == First::kNativeClusters && (backends & kHasClusters));
  return native_first ? Way::kNative : Way::kTriton;
}

}  // namespace fastroute

TORCH_LIBRARY_FRAGMENT(fastroute_native, m) {
  // Sets the backend named by the user in Python; an empty name for none.
  m.def("name_backend(str name) -> ()", [](const std::string& name) { fastroute::name_backend(name); });
}
