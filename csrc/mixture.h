// The tensors of the mixture-EM loss: checks for memory safety, and allocation of the results. fastroute.ops has the checks
// with messages for users.

#pragma once

#include "paths.h"

#include <ATen/ops/empty.h>

namespace fastroute {

constexpr int64_t kMaxClusters = 1024;

inline void check_mixture(const at::Tensor& t, const at::Tensor& scores, at::IntArrayRef shape, at::ScalarType type) {
  TORCH_CHECK(
      t.defined() && t.sizes() == shape && t.scalar_type() == type && t.device() == scores.device() && t.is_contiguous(),
      "the mixture-EM loss takes contiguous tensors that agree in shape, type and device");
}

// Scores (N, K) or (N, m, K), optionally with those of the augmented samples.
struct Mixtures {
  int64_t samples, mixtures, clusters;
  at::ScalarType type;                 // of the sums
  at::IntArrayRef columns;             // (K) or (m, K)
  std::vector<int64_t> statistics;     // (views, *columns)

  // For a forward, which also checks the tensors with one value per cluster.
  Mixtures(
      const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior,
      const OptionalTensor& mean, const OptionalTensor& std)
      : Mixtures(scores, scores_aug) {
    TORCH_CHECK(mean.has_value() == std.has_value(), "mean and std are both needed, or neither");
    for (const auto* t : {&prior, &mean, &std}) {
      if (t->has_value()) check_mixture(**t, scores, columns, type);
    }
  }

  Mixtures(const at::Tensor& scores, const OptionalTensor& scores_aug)
      : samples(scores.size(0)),
        mixtures(scores.dim() == 3 ? scores.size(1) : 1),
        clusters(scores.size(-1)),
        type(accumulate_type(scores.scalar_type())),
        columns(scores.sizes().slice(1)),
        statistics(columns.vec()) {
    TORCH_CHECK(scores.dim() == 2 || scores.dim() == 3, "scores must have two or three dimensions, not ", scores.dim());
    TORCH_CHECK(clusters >= 1 && clusters <= kMaxClusters, "1 to 1024 clusters are served, not ", clusters);
    check_mixture(scores, scores, scores.sizes(), scores.scalar_type());
    if (scores_aug) check_mixture(*scores_aug, scores, scores.sizes(), scores.scalar_type());
    statistics.insert(statistics.begin(), scores_aug ? 2 : 1);
  }
  // Stride between samples; the scores of one sample and mixture are contiguous.
  int64_t stride() const { return mixtures * clusters; }
  double weight() const { return 1.0 / static_cast<double>(samples ? samples : 1); }  // without samples the loss is 0
  at::IntArrayRef losses() const { return columns.slice(0, columns.size() - 1); }
};

using MixtureResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline MixtureResult empty_mixture(const Mixtures& g, const at::Tensor& scores) {
  const auto options = scores.options().dtype(g.type);
  return {
      at::empty(g.losses(), options), at::empty(scores.sizes(), options), at::empty(g.statistics, options),
      at::empty(g.statistics, options)};
}

inline std::tuple<at::Tensor, at::Tensor> empty_mixture_grads(const at::Tensor& scores, const OptionalTensor& aug) {
  at::Tensor grad = at::empty(scores.sizes(), scores.options());
  return {grad, aug ? at::empty(scores.sizes(), scores.options()) : at::empty({0}, scores.options())};
}

// Null for an absent tensor.
template <typename A>
const A* data(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<A>() : nullptr;
}

}  // namespace fastroute
