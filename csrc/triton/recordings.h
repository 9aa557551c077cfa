// Launches of Triton kernels that bypass Python. Python runs a call once, compiles its kernels and passes a recording of the
// launches (fastroute/backends/triton/_recording.py). A later call whose arguments differ only in addresses and values
// allocates the same tensors and launches the same kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <exception>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace fastroute::triton {

// Arguments of a call: its tensors in order, and a key with everything that launches may depend on.
class Call {
 public:
  Call(const char* name, at::Device device);

  void add(const at::Tensor& tensor);
  void add(const std::optional<at::Tensor>& tensor);
  void add(at::TensorList tensors);
  void add(bool value) { add_raw(value); }
  void add(double value) { add_raw(value); }
  void add(at::IntArrayRef values);
  void add(std::string_view text);

  const std::vector<at::Tensor>& tensors() const { return tensors_; }
  const std::string& key() const { return key_; }
  at::Device device() const { return device_; }

 private:
  template <typename T>
  void add_raw(T value) {
    key_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  at::Device device_;
  std::vector<at::Tensor> tensors_;
  std::vector<const void*> addresses_;
  std::string key_;
};

// Results of a call as groups: each list of tensors and each single tensor is one group.
using Groups = std::vector<std::vector<at::Tensor>>;

// Replays the recording of such a call; returns nothing if there is none.
std::optional<Groups> replay(const Call& call);

// During its lifetime, Python may record the call on this thread. A call that Python computes without recording it is not
// offered again; one that fails is.
class Offer {
 public:
  explicit Offer(const Call& call);
  ~Offer();
  Offer(const Offer&) = delete;
  Offer& operator=(const Offer&) = delete;

 private:
  int exceptions_ = std::uncaught_exceptions();
};

template <typename Result>
Result from_groups(Groups groups) {
  if constexpr (std::is_same_v<Result, std::vector<at::Tensor>>) {
    return std::move(groups[0]);
  } else {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      const auto element = []<typename T>(std::vector<at::Tensor>& group, const T*) -> T {
        if constexpr (std::is_same_v<T, at::Tensor>) {
          return std::move(group[0]);
        } else {
          return std::move(group);
        }
      };
      return Result(element(groups[I], static_cast<const std::tuple_element_t<I, Result>*>(nullptr))...);
    }(std::make_index_sequence<std::tuple_size_v<Result>>());
  }
}

template <typename Result, typename... Parameters, typename... Args>
Result call(
    const char* name, const c10::TypedOperatorHandle<Result(Parameters...)>& python, at::Device device,
    const Args&... args) {
  Call call(name, device);
  (call.add(args), ...);
  if (auto groups = replay(call)) return from_groups<Result>(std::move(*groups));
  const Offer offer(call);
  return python.call(args...);
}

}  // namespace fastroute::triton
