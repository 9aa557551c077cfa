// mixture_em_loss (Eq. 4.11 to 4.23): checks, the choice of a backend, and autograd.

#include "mixture.h"
#include "ops/autograd.h"

#include <torch/library.h>

#include <charconv>
#include <cmath>

namespace fastroute {
namespace {

const auto& forward_op() {
  static const Operator<MixtureResult(
      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      double)>
      op("mixture_em_loss");
  return op;
}

using MixtureGradients = std::tuple<at::Tensor, at::Tensor>;

const auto& backward_op() {
  static const Operator<MixtureGradients(
      const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, double, bool)>
      op("mixture_em_loss_backward");
  return op;
}

// Formats a number as Python does.
std::string number(double value) {
  char text[32];
  std::string written(text, std::to_chars(text, text + sizeof text, value).ptr);
  return written.find_first_of(".en") == std::string::npos ? written + ".0" : written;
}

template <typename A>
std::string row(const A* values, int64_t count) {
  std::string text = "[";
  for (int64_t k = 0; k < count; ++k) text += (k ? ", " : "") + number(static_cast<double>(values[k]));
  return text + "]";
}

void check_scores(const at::Tensor& scores) {
  check_given("scores", scores);
  TORCH_CHECK_TYPE(
      is_served(scores.scalar_type()), "scores has dtype ", name(scores.scalar_type()), "; it must be one of ",
      kServedTypes);
  TORCH_CHECK_VALUE(
      (scores.dim() == 2 || scores.dim() == 3) && scores.size(-1) >= 1 && scores.size(-1) <= kMaxClusters &&
          scores.size(1) != 0,
      "scores has shape ", tuple(scores.sizes()), "; it must be (N, K), or (N, m, K) for m gates, with K from 1 to ",
      kMaxClusters);
}

void check_augmented(const at::Tensor& aug, const at::Tensor& scores) {
  const auto rest = [](const char* what, const std::string& ours, const std::string& theirs) {
    return std::string("scores_aug has ") + what + " " + ours + "; it must have the " + what + " of scores, " + theirs;
  };
  TORCH_CHECK_VALUE(aug.sizes() == scores.sizes(), rest("shape", tuple(aug.sizes()), tuple(scores.sizes())));
  TORCH_CHECK_TYPE(
      aug.scalar_type() == scores.scalar_type(), rest("dtype", name(aug.scalar_type()), name(scores.scalar_type())));
  TORCH_CHECK_VALUE(aug.device() == scores.device(), rest("device", aug.device().str(), scores.device().str()));
}

// Returns one number per cluster in the form that all backends take: contiguous, in the accumulation type.
OptionalTensor per_column(const char* label, const OptionalTensor& given, const at::Tensor& scores) {
  if (!given) return given;
  const at::Tensor& value = *given;
  const auto shape = scores.sizes().slice(1), last = scores.sizes().slice(scores.dim() - 1);
  TORCH_CHECK_VALUE(
      value.sizes() == shape || value.sizes() == last, label, " has shape ", tuple(value.sizes()),
      "; it must have shape ", shape == last ? tuple(last) : tuple(last) + " or " + tuple(shape));
  TORCH_CHECK_VALUE(
      value.device() == scores.device(), label, " is on ", value.device().str(),
      "; it must be on the device of the scores, ", scores.device().str());
  const auto type = value.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == scores.scalar_type(), label, " has dtype ", name(type), "; it must be ",
      either(scores.scalar_type(), at::kFloat), " for scores of ", name(scores.scalar_type()));
  return value.to(accumulate_type(scores.scalar_type())).expand(shape).contiguous();
}

// Calls f(values, K) for the numbers of every mixture, if they can be read without synchronising.
template <typename F>
void for_rows(const OptionalTensor& columns, F f) {
  if (!columns || !columns->is_cpu()) return;
  dispatch(columns->scalar_type(), [&]<typename A>() {
    const int64_t clusters = columns->size(-1);
    const A* values = columns->const_data_ptr<A>();
    for (const A* end = values + columns->numel(); values != end; values += clusters) f(values, clusters);
  });
}

// The sum may be off by the rounding of the scores' type, in which the prior may have been given.
void check_prior(const OptionalTensor& prior, at::ScalarType type) {
  const double tolerance = type == at::kBFloat16 ? 0x1p-7 : 1e-3;
  for_rows(prior, [&](const auto* values, int64_t clusters) {
    double sum = 0;
    bool positive = true;
    for (int64_t j = 0; j < clusters; ++j) {
      positive &= values[j] >= 0;
      sum += values[j];
    }
    TORCH_CHECK_VALUE(
        positive && std::abs(sum - 1) <= tolerance, "prior is ", row(values, clusters),
        "; it must be numbers from 0 on with sum 1");
  });
}

void check_std(const OptionalTensor& std) {
  for_rows(std, [](const auto* values, int64_t clusters) {
    TORCH_CHECK_VALUE(
        std::none_of(values, values + clusters, [](auto value) { return value < 0; }), "std is ", row(values, clusters),
        "; it must be 0 or greater");
  });
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

MixtureResult mixture_em_loss(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior, const OptionalTensor& mean,
    const OptionalTensor& std, double gamma) {
  check_scores(scores);
  TORCH_CHECK_VALUE(gamma > 0 && std::isfinite(gamma), "gamma is ", number(gamma), "; it must be greater than 0");
  if (scores_aug) check_augmented(*scores_aug, scores);
  TORCH_CHECK_VALUE(mean.has_value() || !std, "std is given without mean; both are needed, or neither");
  TORCH_CHECK_VALUE(std.has_value() || !mean, "mean is given without std; both are needed, or neither");
  const OptionalTensor means = per_column("mean", mean, scores), stds = per_column("std", std, scores);
  check_std(stds);
  const OptionalTensor priors = per_column("prior", prior, scores);
  check_prior(priors, scores.scalar_type());
  return compute(
      forward_op(), scores, kFirstForOnePass, scores.contiguous(), contiguous(scores_aug), priors, means, stds,
      gamma);
}

MixtureGradients mixture_em_loss_backward(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const at::Tensor& posterior, const at::Tensor& means,
    const at::Tensor& scales, const at::Tensor& grad_loss, double gamma, bool batch_statistics) {
  return compute(  // the gradient of a sum of losses is an expanded scalar
      backward_op(), scores, kFirstForOnePass, scores.contiguous(), contiguous(scores_aug), posterior.contiguous(),
      means, scales, grad_loss.contiguous(), gamma, batch_statistics);
}

struct Function : torch::autograd::Function<Function> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior,
      const OptionalTensor& mean, const OptionalTensor& std, double gamma, MixtureResult* result) {
    at::AutoDispatchBelowAutograd below;
    *result = forward_op().public_.call(scores, scores_aug, prior, mean, std, gamma);
    const auto& [loss, posterior, means, scales] = *result;
    ctx->save_for_backward({scores, undefined_or(scores_aug), posterior, means, scales});
    ctx->saved_data["gamma"] = gamma;
    ctx->saved_data["batch_statistics"] = !mean.has_value();
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [grad, grad_aug] = call_backward(
        backward_op(), saved[0], optional(saved[1]), saved[2], saved[3], saved[4], grads[0],
        ctx->saved_data["gamma"].toDouble(), ctx->saved_data["batch_statistics"].toBool());
    // No gradients for the constants and the pointer.
    return {grad, saved[1].defined() ? grad_aug : at::Tensor(), {}, {}, {}, {}, {}};
  }
};

MixtureResult autograd(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior, const OptionalTensor& mean,
    const OptionalTensor& std, double gamma) {
  MixtureResult result;
  std::get<0>(result) = Function::apply(scores, scores_aug, prior, mean, std, gamma, &result);
  return result;
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute, CompositeExplicitAutograd, m) {
  m.impl("mixture_em_loss", &fastroute::mixture_em_loss);
  m.impl("mixture_em_loss_backward", &fastroute::mixture_em_loss_backward);
}

TORCH_LIBRARY_IMPL(fastroute, Autograd, m) {
  m.impl("mixture_em_loss", &fastroute::autograd);
}
