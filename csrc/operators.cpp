// The namespaces. fastroute:: has the operators that users call; csrc/ops checks their arguments and chooses who computes
// them: fastroute_native:: the compiled kernels, which register from libraries of their own, one for each instruction set or
// device, so that a process loads only code that its processor can run; or fastroute_python:: what Python brings.

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
  // Who can serve a tensor like this one, as a sum: 1 for the compiled kernels, 2 for Triton, 4 where the compiled kernels
  // have clusters of multiprocessors.
  m.def("choose(Tensor like) -> int");
}

TORCH_LIBRARY(fastroute_native, m) {
  define_operators(m);
  // The passes around the convolutions of cross-prediction; their sources say what each of them does.
  m.def(
      "sum_predictions(Tensor[] predictions, Tensor gates, Tensor? offsets, bool relu, Tensor(a!)[] outputs) -> ()");
  m.def(
      "scale_paths(Tensor[] paths, Tensor[] masks, Tensor weights, bool sums, Tensor(a!)[] masked,"
      " Tensor(b!)[] scaled) -> Tensor totals");
  m.def("sum_gradients(Tensor[] terms, Tensor[] xs, Tensor gates, Tensor(a!)[] grad_xs) -> Tensor products");
  // As Tensor.new_empty_strided, in the memory that outputs keep from one call to the next.
  m.def("new_empty_strided(Tensor x, int[] size, int[] stride) -> Tensor");
  // Which of their passes the CPU kernels take for m inputs x and n outputs, all alike: past the caches or through them in
  // a forward in the gradient mode of the call, a channel's value by rows or by elements in the backward, whether the next
  // sample is asked for meanwhile, and whether in the forward all threads take each sample together.
  m.def("cpu_plan(Tensor x, int m, int n) -> (bool streamed, bool by_rows, bool looks_ahead, bool shared)");
}
