#include "triton/recordings.h"

#include "triton/driver.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace fastroute::triton {
namespace {

struct Allocation {
  at::ScalarType type;
  std::vector<int64_t> sizes, strides;
};

// An argument of a launch: an address inside a tensor of the call, or a constant.
struct Argument {
  int64_t slot;  // the call's tensors first, then the allocations; kConstant for none
  int64_t value;  // the offset in bytes, or the constant
};
constexpr int64_t kConstant = -1;

struct Launch {
  Grid grid;
  void* function;
  std::vector<Argument> arguments;
};

struct Recording {
  std::vector<Allocation> allocations;
  std::vector<std::vector<int64_t>> results;  // slots, group by group
  std::vector<Launch> launches;
};

// Null for a call that Python did not record. The size is limited, since shapes of more calls hardly recur.
using Recordings = std::unordered_map<std::string, std::shared_ptr<const Recording>>;
constexpr size_t kMostRecordings = 4096;

std::shared_mutex guarding;
Recordings& recordings() {
  static Recordings all;
  return all;
}

void keep(const std::string& key, std::shared_ptr<const Recording> recording) {
  const std::unique_lock lock(guarding);
  if (recordings().size() >= kMostRecordings) recordings().clear();
  recordings().insert_or_assign(key, std::move(recording));
}

// The key of the call that Python may record on this thread, until it does.
thread_local std::optional<std::string> offered;

// Reads the sequence of numbers passed to `record`.
class Reader {
 public:
  explicit Reader(at::IntArrayRef values) : values_(values) {}
  int64_t next() {
    TORCH_CHECK(at_ < values_.size(), "a recording ends too early");
    return values_[at_++];
  }
  // Reads a count, then calls f() that many times.
  template <typename F>
  auto many(F f) {
    std::vector<decltype(f())> items(next());
    for (auto& item : items) item = f();
    return items;
  }
  bool done() const { return at_ == values_.size(); }

 private:
  at::IntArrayRef values_;
  size_t at_ = 0;
};

Recording decode(at::IntArrayRef code) {
  Reader reader(code);
  const auto number = [&] { return reader.next(); };
  Recording recording;
  recording.allocations = reader.many([&] {
    const auto type = static_cast<at::ScalarType>(number());
    auto sizes = reader.many(number);
    return Allocation{type, std::move(sizes), reader.many(number)};
  });
  recording.results = reader.many([&] { return reader.many(number); });
  recording.launches = reader.many([&] {
    Launch launch;
    launch.function = reinterpret_cast<void*>(number());
    for (unsigned* size : {&launch.grid.x, &launch.grid.y, &launch.grid.z, &launch.grid.threads, &launch.grid.shared}) {
      *size = static_cast<unsigned>(number());
    }
    launch.grid.dependent = number();
    launch.arguments = reader.many([&] {
      const int64_t slot = number();
      return Argument{slot, number()};
    });
    return launch;
  });
  TORCH_CHECK(reader.done(), "a recording is longer than what it describes");
  return recording;
}

bool is_offered() { return offered.has_value(); }

void record(at::IntArrayRef code) {
  TORCH_CHECK(offered, "no call is offered for recording on this thread");
  keep(*offered, std::make_shared<const Recording>(decode(code)));
  offered.reset();
}

void forget() {
  const std::unique_lock lock(guarding);
  recordings().clear();
}

}  // namespace

Call::Call(const char* name, at::Device device) : device_(device), key_(name) {
  add_raw(device.type());
  add_raw(device.index());
}

void Call::add(const at::Tensor& tensor) {
  add_raw(tensor.scalar_type());
  add_raw(tensor.dim());
  const void* address = tensor.const_data_ptr();
  // Triton compiles different code for addresses divisible by 16.
  add_raw(reinterpret_cast<uintptr_t>(address) % 16 == 0);
  // A recording may name either of two arguments at one address.
  add_raw(std::find(addresses_.begin(), addresses_.end(), address) - addresses_.begin());
  addresses_.push_back(address);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  key_.append(reinterpret_cast<const char*>(sizes.data()), sizes.size() * sizeof(int64_t));
  key_.append(reinterpret_cast<const char*>(strides.data()), strides.size() * sizeof(int64_t));
  tensors_.push_back(tensor);
}

void Call::add(const std::optional<at::Tensor>& tensor) {
  add_raw(tensor.has_value());
  if (tensor) add(*tensor);
}

void Call::add(at::TensorList tensors) {
  add_raw(tensors.size());
  for (const auto& tensor : tensors) add(tensor);
}

void Call::add(at::IntArrayRef values) {
  add_raw(values.size());
  key_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

void Call::add(std::string_view text) {
  add_raw(text.size());
  key_.append(text);
}

std::optional<Groups> replay(const Call& call) {
  std::shared_ptr<const Recording> recording;
  {
    const std::shared_lock lock(guarding);
    const auto found = recordings().find(call.key());
    if (found == recordings().end() || !found->second) return std::nullopt;
    recording = found->second;
  }
  const c10::DeviceGuard guard(call.device());
  std::vector<at::Tensor> slots = call.tensors();
  slots.reserve(slots.size() + recording->allocations.size());
  for (const auto& allocation : recording->allocations) {
    slots.push_back(at::empty_strided(
        allocation.sizes, allocation.strides, at::TensorOptions(allocation.type).device(call.device())));
  }
  std::vector<const char*> addresses;
  addresses.reserve(slots.size());
  for (const auto& slot : slots) addresses.push_back(static_cast<const char*>(slot.const_data_ptr()));

  void* stream = nullptr;  // on a CPU, where tests use a stub driver
  if (call.device().is_cuda()) {
    stream = c10::impl::VirtualGuardImpl(call.device().type()).getStream(call.device()).native_handle();
  }
  std::vector<int64_t> values;
  std::vector<void*> pointers;
  bool first = true;
  for (const auto& launch : recording->launches) {
    const size_t count = launch.arguments.size();
    values.resize(count + 2);  // Triton adds two arguments for scratch memory, which is not used
    pointers.resize(count + 2);
    for (size_t i = 0; i < count; ++i) {
      const auto& [slot, value] = launch.arguments[i];
      values[i] = slot == kConstant ? value : reinterpret_cast<int64_t>(addresses[slot] + value);
    }
    values[count] = values[count + 1] = 0;
    for (size_t i = 0; i < count + 2; ++i) pointers[i] = &values[i];
    if (!launch_kernel(launch.function, launch.grid, stream, pointers.data(), first)) return std::nullopt;
    first = false;
  }

  Groups groups(recording->results.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    for (const int64_t slot : recording->results[g]) groups[g].push_back(slots[slot]);
  }
  return groups;
}

Offer::Offer(const Call& call) {
  const std::shared_lock lock(guarding);
  if (recordings().find(call.key()) == recordings().end()) offered = call.key();
}

Offer::~Offer() {
  if (offered && std::uncaught_exceptions() == exceptions_) keep(*offered, nullptr);
  offered.reset();
}

}  // namespace fastroute::triton

TORCH_LIBRARY_FRAGMENT(fastroute_native, m) {
  // Whether Python may record the current call; and the recording as numbers: allocations, results, launches.
  m.def("recording_is_offered() -> bool", [] { return fastroute::triton::is_offered(); });
  m.def("record(int[] code) -> ()", [](at::IntArrayRef code) { fastroute::triton::record(code); });
  // Drops all recordings, for tests and after changes to launch configurations.
  m.def("forget_recordings() -> ()", [] { fastroute::triton::forget(); });
}
