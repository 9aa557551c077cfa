// The native operators' schemas. Their kernels register from libraries of their own, one for each instruction set or
// device, so that a process loads only code that its processor can run.

#include <torch/library.h>

#include <string>

TORCH_LIBRARY(fastroute_native, m) {
  m.def(
      "cross_connect(Tensor[] xs, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, bool relu)"
      " -> (Tensor[] outputs, Tensor gates, Tensor scores, Tensor pooled, Tensor hidden)");
  m.def(
      "cross_connect_backward(Tensor[] grad_outputs, Tensor? grad_gates, Tensor? grad_scores, Tensor[] xs,"
      " Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor gates, Tensor pooled, Tensor hidden, bool relu,"
      " bool grad_inputs)"
      " -> (Tensor[] grad_xs, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)");
  m.def("mix(Tensor[] xs, Tensor gates) -> Tensor[]");
  m.def(
      "mix_backward(Tensor[] grad_outputs, Tensor[] xs, Tensor gates, bool grad_inputs)"
      " -> (Tensor[] grad_xs, Tensor grad_gates)");
  m.def(
      "mixture_em_loss(Tensor scores, Tensor? scores_aug, Tensor? prior, Tensor? mean, Tensor? std, float gamma)"
      " -> (Tensor loss, Tensor posterior, Tensor means, Tensor scales)");
  m.def(
      "mixture_em_loss_backward(Tensor scores, Tensor? scores_aug, Tensor posterior, Tensor means, Tensor scales,"
      " Tensor grad_loss, float gamma, bool batch_statistics) -> (Tensor grad_scores, Tensor grad_scores_aug)");
  m.def(
      "gate(Tensor[] xs, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2)"
      " -> (Tensor gates, Tensor scores, Tensor pooled, Tensor hidden)");
  m.def(
      "gate_backward(Tensor? grad_gates, Tensor? grad_scores, Tensor[] xs, Tensor? w1, Tensor? b1, Tensor w2,"
      " Tensor? b2, Tensor gates, Tensor pooled, Tensor hidden)"
      " -> (Tensor shares, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)");
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
  // Whether the user has named a backend: then direct.cpp sends all calls through Python, which makes the choice.
  m.def("name_backend(bool named) -> ()");
  // What the libraries were built from, so that a stale build is seen: a hash of csrc, and the version of torch.
  m.def("build() -> (str, str)", [] {
    return std::make_tuple(std::string(FASTROUTE_BUILD), std::string(FASTROUTE_TORCH));
  });
}
