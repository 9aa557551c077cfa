// The choice between the compiled kernels, recorded Triton kernels, and Python.

#pragma once

#include "ops/problem_sizes.h"
#include "triton/recordings.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>

namespace fastroute {

// Returns an operator by its name with its namespace, such as "fastroute_native::mix".
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Signature>();
}

// An operator in each of its namespaces: public, compiled, and Python.
template <typename Signature>
struct Operator {
  std::string name;
  c10::TypedOperatorHandle<Signature> public_, native, python;

  explicit Operator(const std::string& operator_name)
      : name(operator_name), public_(find_operator<Signature>("fastroute::" + name)),
        native(find_operator<Signature>("fastroute_native::" + name)),
        python(find_operator<Signature>("fastroute_python::" + name)) {}
};

enum class Way { kNative, kTriton, kPython };

// Chooses a backend for x; `first` decides if several support it. The flags come from Python and are cached until the user
// names another backend. CPU kernels need no call of Python.
Way way(const at::Tensor& x, First first);

// Computes an operator for checked and prepared arguments. Autocast is disabled: it has already cast the arguments, and would
// cast float32 computations.
template <typename Signature, typename... Args>
auto compute(const Operator<Signature>& op, const at::Tensor& x, First first, const Args&... args) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  switch (way(x, first)) {
    case Way::kNative: return op.native.call(args...);
    case Way::kTriton: return triton::call(op.name.c_str(), op.python, x.device(), args...);
    default: return op.python.call(args...);
  }
}

}  // namespace fastroute
