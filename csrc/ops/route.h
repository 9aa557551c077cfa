// Who computes an operator: the compiled kernels, Triton's by a recording, or Python.

#pragma once

#include "ops/problem_sizes.h"
#include "triton/recordings.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <string>

namespace fastroute {

// An operator in each of its namespaces: as the user calls it, compiled, and by way of Python.
template <typename Signature>
struct Operator {
  std::string name;
  c10::TypedOperatorHandle<Signature> public_, native, python;

  explicit Operator(const std::string& operator_name)
      : name(operator_name), public_(find("fastroute::")), native(find("fastroute_native::")),
        python(find("fastroute_python::")) {}

 private:
  auto find(const char* space) const {
    return c10::Dispatcher::singleton().findSchemaOrThrow((space + name).c_str(), "").template typed<Signature>();
  }
};

enum class Way { kNative, kTriton, kPython };

// Which of the backends that can serve x computes the operator; `first` decides where several can. Asks Python, and
// remembers the answer until the user names another backend. A CPU's kernels need no asking.
Way way(const at::Tensor& x, First first);

// Computes an operator for arguments that have been checked and brought into form. Autocast has cast the arguments where it
// should, and would cast what is computed in float32 on purpose.
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
