// The namespaces. fastroute:: has the public operators; csrc/ops checks their arguments and chooses the implementation.
// fastroute_native:: has the compiled kernels, which are registered by separate libraries, one per instruction set or device,
// so that a process only loads code that its processor can run. fastroute_python:: has the implementations in Python.

#include "build.h"

#include <torch/library.h>

namespace {

constexpr const char* kSchemas[] = {
#define FASTROUTE_OPERATOR(schema) schema,
#include "../fastroute/ops/schemas.inc"
#undef FASTROUTE_OPERATOR
};

void define_operators(torch::Library& m) {
  for (const char* schema : kSchemas) m.def(schema, {at::Tag::pt2_compliant_tag});
}

}  // namespace

TORCH_LIBRARY(fastroute, m) {
  define_operators(m);
}

TORCH_LIBRARY(fastroute_python, m) {
  define_operators(m);
  // Flags of the backends that support a tensor like this one: 1 for the compiled kernels, 2 for Triton, 4 if the compiled
  // kernels can use thread-block clusters.
  m.def("choose(Tensor like) -> int");
}

TORCH_LIBRARY(fastroute_native, m) {
  define_operators(m);
  // The elementwise passes around the convolutions of cross-prediction; documented in their sources.
  m.def(
      "sum_predictions(Tensor[] predictions, Tensor gates, Tensor? offsets, bool relu, Tensor(a!)[] outputs) -> ()");
  m.def(
      "scale_paths(Tensor[] paths, Tensor[] masks, Tensor weights, bool sums, Tensor(a!)[] masked,"
      " Tensor(b!)[] scaled) -> Tensor totals");
  m.def("sum_gradients(Tensor[] terms, Tensor[] xs, Tensor gates, Tensor(a!)[] grad_xs) -> Tensor products");
  // Same as Tensor.new_empty_strided, in memory that is reused between calls.
  m.def("new_empty_strided(Tensor x, int[] size, int[] stride) -> Tensor");
  // For tests: the passes that the CPU kernels choose for m inputs and n outputs like x. `streamed`: a forward in the current
  // gradient mode writes past the caches. `by_rows`: the backward adds a channel's value once per row, not per element.
  // `looks_ahead`: the next sample is prefetched. `shared`: in the forward, all threads work on each sample together.
  m.def("cpu_plan(Tensor x, int m, int n) -> (bool streamed, bool by_rows, bool looks_ahead, bool shared)");
}
