// The operators' way past Python on the CPU: arguments that are right as they stand go from the dispatcher to the compiled
// kernels and their autograd. All others go through Python (fastroute_python), which explains what is wrong with them or
// brings them into form. With cold caches the Python between two layers takes longer than the routing of a small map.

#include "mixture.h"
#include "paths.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>

namespace fastroute {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using CrossConnectForward =
    Forward(at::TensorList, const OptionalTensor&, const OptionalTensor&, const at::Tensor&, const OptionalTensor&, bool);
using CrossConnectBackward = Backward(
    at::TensorList, const OptionalTensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&,
    const OptionalTensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, bool, bool);
using MixForward = std::vector<at::Tensor>(at::TensorList, const at::Tensor&);
using MixBackward =
    std::tuple<std::vector<at::Tensor>, at::Tensor>(at::TensorList, at::TensorList, const at::Tensor&, bool);
using MixtureForward = MixtureResult(
    const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    double);
using MixtureBackward = std::tuple<at::Tensor, at::Tensor>(
    const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, double, bool);

// An operator in each of its namespaces: as the user calls it, compiled, and by way of Python.
template <typename Signature>
struct Operator {
  c10::TypedOperatorHandle<Signature> public_, native, python;

  explicit Operator(const std::string& name)
      : public_(find("fastroute::" + name)), native(find("fastroute_native::" + name)),
        python(find("fastroute_python::" + name)) {}

 private:
  static auto find(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").template typed<Signature>();
  }
};

const auto& cross_connect() {
  static const Operator<CrossConnectForward> op("cross_connect");
  return op;
}
const auto& cross_connect_backward() {
  static const Operator<CrossConnectBackward> op("cross_connect_backward");
  return op;
}
const auto& mix() {
  static const Operator<MixForward> op("mix");
  return op;
}
const auto& mix_backward() {
  static const Operator<MixBackward> op("mix_backward");
  return op;
}
const auto& mixture() {
  static const Operator<MixtureForward> op("mixture_em_loss");
  return op;
}
const auto& mixture_backward() {
  static const Operator<MixtureBackward> op("mixture_em_loss_backward");
  return op;
}

std::atomic<bool> backend_is_named{false};

// Whether the user named a backend, which is Python's business.
bool choice_is_open() {
  const char* variable = std::getenv("FASTROUTE_BACKEND");
  return !backend_is_named.load(std::memory_order_relaxed) && (!variable || !*variable);
}

bool is_path_like(const at::Tensor& x, const at::Tensor& like, bool channels_last) {
  return x.layout() == at::kStrided && x.sizes() == like.sizes() && x.scalar_type() == like.scalar_type() &&
      x.device() == like.device() && sample_is_dense(x, channels_last);
}

bool are_paths(at::TensorList xs, const at::Tensor& like) {
  const auto sizes = like.sizes();
  const auto type = like.scalar_type();
  if (xs.empty() || xs.size() > kMaxPaths || like.layout() != at::kStrided || sizes.size() < 2 || sizes.size() > 5 ||
      std::find(sizes.begin() + 1, sizes.end(), 0) != sizes.end() ||
      (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf && type != at::kDouble)) {
    return false;
  }
  const bool channels_last = !sample_is_dense(like, false);
  return std::all_of(xs.begin(), xs.end(), [&](const auto& x) { return is_path_like(x, like, channels_last); });
}

bool is_weight(const at::Tensor& w, at::IntArrayRef sizes, const at::Tensor& x) {
  return w.sizes() == sizes && w.device() == x.device() &&
      (w.scalar_type() == at::kFloat || w.scalar_type() == x.scalar_type());
}

bool are_parameters(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2) {
  const int64_t m = static_cast<int64_t>(xs.size()), channels = xs[0].size(1);
  if (w2.dim() != 3 || (w1 ? w1->dim() != 3 : b1.has_value())) return false;
  const int64_t n = w2.size(1), hidden = w1 ? w1->size(1) : channels;
  return n >= 1 && n <= kMaxPaths && hidden >= 1 && (!w1 || is_weight(*w1, {m, hidden, channels}, xs[0])) &&
      (!b1 || is_weight(*b1, {m, hidden}, xs[0])) && is_weight(w2, {m, n, hidden}, xs[0]) &&
      (!b2 || is_weight(*b2, {m, n}, xs[0]));
}

bool are_gates(const at::Tensor& gates, at::TensorList xs) {
  if (gates.dim() != 2 && gates.dim() != 3) return false;
  const int64_t m = static_cast<int64_t>(xs.size()), n = gates.size(-1);
  return n >= 1 && n <= kMaxPaths &&
      (gates.dim() == 2 ? is_weight(gates, {m, n}, xs[0]) : is_weight(gates, {xs[0].size(0), m, n}, xs[0]));
}

bool are_scores(const at::Tensor& x) {
  const auto type = x.scalar_type();
  return (x.dim() == 2 || x.dim() == 3) && x.size(1) >= 1 && x.size(-1) >= 1 && x.size(-1) <= kMaxClusters &&
      x.is_contiguous() && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble);
}

bool is_dense(const OptionalTensor& x, at::IntArrayRef sizes, at::ScalarType type, at::Device device) {
  return !x || (x->sizes() == sizes && x->scalar_type() == type && x->device() == device && x->is_contiguous());
}

// Whether f(values, K) holds of the numbers of every mixture.
template <typename F>
bool holds(const at::Tensor& x, F f) {
  return dispatch(x.scalar_type(), [&]<typename A>() {
    const int64_t clusters = x.size(-1);
    const A* values = x.const_data_ptr<A>();
    for (const A* end = values + x.numel(); values != end; values += clusters) {
      if (!f(values, clusters)) return false;
    }
    return true;
  });
}

bool is_prior(const at::Tensor& x) {
  return holds(x, [](const auto* values, int64_t clusters) {
    double sum = 0;
    for (int64_t j = 0; j < clusters; ++j) {
      if (!(values[j] >= 0)) return false;
      sum += values[j];
    }
    return std::abs(sum - 1) <= 1e-3;
  });
}

bool is_std(const at::Tensor& x) {
  return holds(x, [](const auto* values, int64_t clusters) {
    return std::none_of(values, values + clusters, [](auto value) { return value < 0; });
  });
}

Forward cross_connect_cpu(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, bool relu) {
  const bool direct = choice_is_open() && !xs.empty() && are_paths(xs, xs[0]) && are_parameters(xs, w1, b1, w2, b2);
  return (direct ? cross_connect().native : cross_connect().python).call(xs, w1, b1, w2, b2, relu);
}

Backward cross_connect_backward_cpu(
    at::TensorList grad_outputs, const OptionalTensor& grad_gates, const OptionalTensor& grad_scores,
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, const at::Tensor& gates, const at::Tensor& pooled, const at::Tensor& hidden,
    bool relu, bool grad_inputs) {
  const bool direct = choice_is_open() && !xs.empty() && are_paths(xs, xs[0]) && are_paths(grad_outputs, xs[0]);
  return (direct ? cross_connect_backward().native : cross_connect_backward().python)
      .call(grad_outputs, grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden, relu, grad_inputs);
}

std::vector<at::Tensor> mix_cpu(at::TensorList xs, const at::Tensor& gates) {
  const bool direct = choice_is_open() && !xs.empty() && are_paths(xs, xs[0]) && are_gates(gates, xs);
  return (direct ? mix().native : mix().python).call(xs, gates);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> mix_backward_cpu(
    at::TensorList grad_outputs, at::TensorList xs, const at::Tensor& gates, bool grad_inputs) {
  const bool direct = choice_is_open() && !xs.empty() && are_paths(xs, xs[0]) && are_paths(grad_outputs, xs[0]);
  return (direct ? mix_backward().native : mix_backward().python).call(grad_outputs, xs, gates, grad_inputs);
}

MixtureResult mixture_cpu(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior, const OptionalTensor& mean,
    const OptionalTensor& std, double gamma) {
  const auto is_column = [&](const OptionalTensor& x) {
    return is_dense(x, scores.sizes().slice(1), accumulate_type(scores.scalar_type()), scores.device());
  };
  const bool direct = choice_is_open() && gamma > 0 && std::isfinite(gamma) && are_scores(scores) &&
      is_dense(scores_aug, scores.sizes(), scores.scalar_type(), scores.device()) && is_column(prior) &&
      is_column(mean) && is_column(std) && mean.has_value() == std.has_value() && (!prior || is_prior(*prior)) &&
      (!std || is_std(*std));
  return (direct ? mixture().native : mixture().python).call(scores, scores_aug, prior, mean, std, gamma);
}

std::tuple<at::Tensor, at::Tensor> mixture_backward_cpu(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const at::Tensor& posterior, const at::Tensor& means,
    const at::Tensor& scales, const at::Tensor& grad_loss, double gamma, bool batch_statistics) {
  const bool direct = choice_is_open() && are_scores(scores) && (!scores_aug || scores_aug->is_contiguous()) &&
      posterior.is_contiguous();
  return (direct ? mixture_backward().native : mixture_backward().python)
      .call(  // the gradient of a sum of losses is one number, expanded
          scores, scores_aug, posterior, means, scales, grad_loss.contiguous(), gamma, batch_statistics);
}

// A forward through the dispatcher below autograd. The gradient mode, which Function::apply turns off, tells the kernels
// whether a backward is known to follow; of one in a compiled graph nothing is known here.
template <typename Signature, typename... Args>
auto call_forward(const Operator<Signature>& op, bool recorded, const Args&... args) {
  at::AutoDispatchBelowAutograd below;
  at::AutoGradMode mode(recorded);
  return op.public_.call(args...);
}

// A backward through the dispatcher: below autograd, unless it is to be differentiated itself.
template <typename Signature, typename... Args>
auto call_backward(const Operator<Signature>& op, const Args&... args) {
  if (at::GradMode::is_enabled()) return op.public_.call(args...);
  at::AutoDispatchBelowAutograd below;
  return op.public_.call(args...);
}

OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

at::Tensor undefined_or(const OptionalTensor& t) {
  return t.value_or(at::Tensor());
}

void materialize(variable_list& grads, const at::Tensor& like) {
  for (auto& grad : grads) {
    if (!grad.defined()) grad = at::zeros_like(like);
  }
}

bool any_needs_grad(AutogradContext* ctx, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (ctx->needs_input_grad(i)) return true;
  }
  return false;
}

struct CrossConnect : torch::autograd::Function<CrossConnect> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kOthers = 7;  // saved beside the paths

  // What cannot be differentiated goes out by pointer: compiled autograd knows no `mark_non_differentiable`.
  static variable_list forward(
      AutogradContext* ctx, at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1,
      const at::Tensor& w2, const OptionalTensor& b2, bool relu, bool recorded, at::Tensor* pooled, at::Tensor* hidden) {
    auto [results, gates, scores, pooled_, hidden_] = call_forward(cross_connect(), recorded, xs, w1, b1, w2, b2, relu);
    ctx->saved_data["relu"] = relu;
    ctx->set_materialize_grads(false);
    variable_list saved = {undefined_or(w1), undefined_or(b1), w2, undefined_or(b2), gates, pooled_, hidden_};
    saved.insert(saved.end(), xs.begin(), xs.end());
    ctx->save_for_backward(std::move(saved));
    *pooled = std::move(pooled_);
    *hidden = std::move(hidden_);
    results.insert(results.end(), {gates, scores});
    return std::move(results);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList xs = at::TensorList(saved).slice(kOthers);
    const OptionalTensor w1 = optional(saved[0]), b1 = optional(saved[1]), b2 = optional(saved[3]);
    const at::Tensor& w2 = saved[2];
    const size_t n = grads.size() - 2;
    const OptionalTensor grad_gates = optional(grads[n]), grad_scores = optional(grads[n + 1]);
    grads.resize(n);
    materialize(grads, xs[0]);
    const bool grad_inputs = any_needs_grad(ctx, xs.size());
    auto [results, grad_w1, grad_b1, grad_w2, grad_b2] = call_backward(
        cross_connect_backward(), at::TensorList(grads), grad_gates, grad_scores, xs, w1, b1, w2, b2, saved[4],
        saved[5], saved[6], ctx->saved_data["relu"].toBool(), grad_inputs);
    results.resize(xs.size());
    const auto add = [&](const at::Tensor& grad, const OptionalTensor& of) {
      results.push_back(of ? grad.to(of->scalar_type()) : at::Tensor());
    };
    add(grad_w1, w1);
    add(grad_b1, b1);
    add(grad_w2, w2);
    add(grad_b2, b2);
    results.resize(results.size() + 4);  // nothing for relu, recorded and the pointers
    return std::move(results);
  }
};

Forward cross_connect_autograd(
    at::TensorList xs, const OptionalTensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
    const OptionalTensor& b2, bool relu) {
  at::Tensor pooled, hidden;
  const bool recorded = torch::autograd::compute_requires_grad(xs, w1, b1, w2, b2);
  variable_list results = CrossConnect::apply(xs, w1, b1, w2, b2, relu, recorded, &pooled, &hidden);
  const size_t n = results.size() - 2;
  Forward forward{{}, results[n], results[n + 1], pooled, hidden};
  results.resize(n);
  std::get<0>(forward) = std::move(results);
  return forward;
}

struct Mix : torch::autograd::Function<Mix> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, at::TensorList xs, const at::Tensor& gates, bool recorded) {
    ctx->set_materialize_grads(false);
    variable_list saved = {gates};
    saved.insert(saved.end(), xs.begin(), xs.end());
    ctx->save_for_backward(std::move(saved));
    return call_forward(mix(), recorded, xs, gates);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& gates = saved[0];
    const at::TensorList xs = at::TensorList(saved).slice(1);
    materialize(grads, xs[0]);
    auto [results, grad_gates] =
        call_backward(mix_backward(), at::TensorList(grads), xs, gates, any_needs_grad(ctx, xs.size()));
    results.resize(xs.size());
    results.push_back(grad_gates.to(gates.scalar_type()));
    results.emplace_back();  // nothing for recorded
    return std::move(results);
  }
};

std::vector<at::Tensor> mix_autograd(at::TensorList xs, const at::Tensor& gates) {
  return Mix::apply(xs, gates, torch::autograd::compute_requires_grad(xs, gates));
}

struct Mixture : torch::autograd::Function<Mixture> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior,
      const OptionalTensor& mean, const OptionalTensor& std, double gamma, MixtureResult* result) {
    at::AutoDispatchBelowAutograd below;
    *result = mixture().public_.call(scores, scores_aug, prior, mean, std, gamma);
    const auto& [loss, posterior, means, scales] = *result;
    ctx->save_for_backward({scores, undefined_or(scores_aug), posterior, means, scales});
    ctx->saved_data["gamma"] = gamma;
    ctx->saved_data["batch_statistics"] = !mean.has_value();
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto [grad, grad_aug] = call_backward(
        mixture_backward(), saved[0], optional(saved[1]), saved[2], saved[3], saved[4], grads[0],
        ctx->saved_data["gamma"].toDouble(), ctx->saved_data["batch_statistics"].toBool());
    // Nothing for the constants and the pointer.
    return {grad, saved[1].defined() ? grad_aug : at::Tensor(), {}, {}, {}, {}, {}};
  }
};

MixtureResult mixture_autograd(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior, const OptionalTensor& mean,
    const OptionalTensor& std, double gamma) {
  MixtureResult result;
  std::get<0>(result) = Mixture::apply(scores, scores_aug, prior, mean, std, gamma, &result);
  return result;
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute, CPU, m) {
  m.impl("cross_connect", &fastroute::cross_connect_cpu);
  m.impl("cross_connect_backward", &fastroute::cross_connect_backward_cpu);
  m.impl("mix", &fastroute::mix_cpu);
  m.impl("mix_backward", &fastroute::mix_backward_cpu);
  m.impl("mixture_em_loss", &fastroute::mixture_cpu);
  m.impl("mixture_em_loss_backward", &fastroute::mixture_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastroute, AutogradCPU, m) {
  m.impl("cross_connect", &fastroute::cross_connect_autograd);
  m.impl("mix", &fastroute::mix_autograd);
  m.impl("mixture_em_loss", &fastroute::mixture_autograd);
}

TORCH_LIBRARY_IMPL(fastroute_native, CompositeExplicitAutograd, m) {
  m.impl("name_backend", [](bool named) { fastroute::backend_is_named = named; });
}
