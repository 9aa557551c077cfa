// The mixture-EM loss of one or m mixtures (Eq. 4.11 to 4.23), and its gradient with the posteriors held constant.
//
// A mixture's scores are transposed once, so that each cluster's are contiguous and all arithmetic is vectorised over samples,
// which are many, not over clusters, which are few.

#include "cpu/pack.h"
#include "mixture.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace fastroute {
namespace {

// Calls f(mixture) for each mixture.
template <typename F>
void for_mixtures(const Mixtures& g, F f) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(g.samples * g.clusters, 1));
  at::parallel_for(0, g.mixtures, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Distance between rows of samples: whole registers plus one; rows a power of two apart would share few cache sets.
template <typename V>
int64_t row_pitch(int64_t samples) {
  return (samples / V::size() + 2) * V::size();
}

// Bytes of scratch that a thread keeps from one call to the next.
constexpr int64_t kKeptScratch = int64_t{1} << 20;

// Memory of one mixture during a call. Small blocks are kept by the thread, since calls are short and frequent.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    static thread_local std::vector<A> kept;
    if (count * static_cast<int64_t>(sizeof(A)) > kKeptScratch) {
      own_ = std::make_unique_for_overwrite<A[]>(count);
    } else if (static_cast<int64_t>(kept.size()) < count) {
      kept.resize(count);
    }
    data_ = own_ ? own_.get() : kept.data();
  }
  A* data() const { return data_; }

 private:
  std::unique_ptr<A[]> own_;
  A* data_;
};

// A sum of many terms, block by block: its error grows with the block length plus the number of blocks, not with the number
// of terms.
template <typename V>
class Sum {
 public:
  void add(const V& term) {
    block_ = block_ + term;
    if (++terms_ % kTerms) return;
    total_ = total_ + block_;
    block_ = V(0);
  }
  V get() const { return total_ + block_; }

 private:
  static constexpr int64_t kTerms = 32;
  V block_ = V(0), total_ = V(0);
  int64_t terms_ = 0;
};

// Transposes (samples, clusters) to [cluster][sample], rows `pitch` apart; lanes past the samples are not written.
template <typename T, typename A>
void turn(const T* from, const Mixtures& g, int64_t pitch, A* to) {
  for (int64_t s = 0; s < g.samples; ++s) {
    for (int64_t j = 0; j < g.clusters; ++j) to[j * pitch + s] = static_cast<A>(from[s * g.stride() + j]);
  }
}

template <typename T, typename A>
void turn_back(const A* from, const Mixtures& g, int64_t pitch, T* to) {
  for (int64_t s = 0; s < g.samples; ++s) {
    for (int64_t j = 0; j < g.clusters; ++j) to[s * g.stride() + j] = static_cast<T>(from[j * pitch + s]);
  }
}

// Σ f(s) over vectors of samples; lanes past the samples count as 0.
template <typename A, typename F>
A sum_over(int64_t samples, F f) {
  using V = at::vec::Vectorized<A>;
  Sum<V> total;
  for (int64_t s = 0; s < samples; s += V::size()) {
    const V value = f(s);
    total.add(samples - s >= V::size() ? value : V::set(V(0), value, samples - s));
  }
  return horizontal_sum(total.get());
}

// The largest f(s), for f(s) ≥ 0.
template <typename A, typename F>
A max_over(int64_t samples, F f) {
  using V = at::vec::Vectorized<A>;
  V largest(0);
  for (int64_t s = 0; s < samples; s += V::size()) {
    const V value = f(s);
    largest = at::vec::maximum(largest, samples - s >= V::size() ? value : V::set(V(0), value, samples - s));
  }
  A lanes[V::size()];
  largest.store(lanes);
  return *std::max_element(lanes, lanes + V::size());
}

// 1/σ, or 0 if σ is 0 or so small that its inverse overflows.
template <typename A>
A inverse(A sigma) {
  const A scale = 1 / sigma;
  return std::isinf(scale) ? A(0) : scale;
}

// μ and 1/σ of one column, with 1/σ = 0 if σ = 0 (Eq. 4.11). The sums are over distances to the first sample, so that σ = 0
// exactly for a constant column. Distances are divided by a power of two near the largest, so that no square over- or
// underflows.
template <typename A>
void statistics(const A* column, int64_t samples, A weight, A& mean, A& scale) {
  using V = at::vec::Vectorized<A>;
  if (samples == 0) {
    mean = scale = 0;
    return;
  }
  const V first(column[0]);
  const A largest = max_over<A>(samples, [&](int64_t s) { return (V::loadu(column + s) - first).abs(); });
  constexpr int kLast = std::numeric_limits<A>::max_exponent - 2;  // exponent of a power of two whose inverse is normal too
  const int exponent = largest > 0 ? std::clamp(std::ilogb(largest), -kLast, kLast) : 0;
  const A unit = std::ldexp(A(1), exponent), per_unit = std::ldexp(A(1), -exponent);
  const auto distance = [&](int64_t s) { return (V::loadu(column + s) - first) * V(per_unit); };
  const A shift = weight * sum_over<A>(samples, distance);
  const A variance = weight * sum_over<A>(samples, [&](int64_t s) {
                       const V d = distance(s) - V(shift);
                       return d * d;
                     });
  mean = column[0] + shift * unit;
  scale = inverse(std::sqrt(variance)) * per_unit;  // keeps NaN
  if (std::isinf(scale)) scale = 0;
}

// log sigmoid(x), up to a rounding of 1: with log1p, exact for tiny values too, the forward took 2 to 4 times as long.
template <typename V>
V log_sigmoid(const V& x) {
  return at::vec::minimum(x, V(0)) - (V(1) + x.abs().neg().exp()).log();
}

template <typename V>
V sigmoid(const V& x) {
  return V(1) / (V(1) + x.neg().exp());
}

MixtureResult mixture_em_loss(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const OptionalTensor& prior, const OptionalTensor& mean,
    const OptionalTensor& std, double gamma) {
  const Mixtures g(scores, scores_aug, prior, mean, std);
  MixtureResult result = empty_mixture(g, scores);
  auto& [loss, posterior, means, scales] = result;
  dispatch(scores.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    using V = at::vec::Vectorized<A>;
    const T* from[2] = {scores.const_data_ptr<T>(), data<T>(scores_aug)};
    const A *given[2] = {data<A>(mean), data<A>(std)}, *priors = data<A>(prior);
    A *losses = loss.mutable_data_ptr<A>(), *posteriors = posterior.mutable_data_ptr<A>();
    A *mus = means.mutable_data_ptr<A>(), *rhos = scales.mutable_data_ptr<A>();
    const int64_t K = g.clusters, views = g.statistics[0], stride = g.stride();
    const int64_t pitch = row_pitch<V>(g.samples);
    const A weight = static_cast<A>(g.weight()), over_gamma = static_cast<A>(1 / gamma);

    for_mixtures(g, [&](int64_t i) {
      const Scratch<A> scratch((views + 1) * K * pitch + K);
      A* const a = scratch.data();  // [views][K][pitch], then p [K][pitch] and log π [K]
      A *const p = a + views * K * pitch, *const log_prior = p + K * pitch;
      const A least = std::log(std::numeric_limits<A>::min());  // for log π in p log π, which tends to 0 with π
      for (int64_t j = 0; j < K; ++j) log_prior[j] = priors ? std::log(priors[i * K + j]) : A(0);
      for (int64_t v = 0; v < views; ++v) {
        turn(from[v] + i * K, g, pitch, a + v * K * pitch);
        for (int64_t j = 0; j < K; ++j) {
          A *column = a + (v * K + j) * pitch, &mu = mus[v * stride + i * K + j], &rho = rhos[v * stride + i * K + j];
          if (given[0]) {
            mu = given[0][i * K + j];
            rho = inverse(given[1][i * K + j]);
          } else {
            statistics(column, g.samples, weight, mu, rho);
          }
          for (int64_t s = 0; s < g.samples; s += V::size()) {
            ((V::loadu(column + s) - V(mu)) * V(rho)).store(column + s);  // Eq. 4.11
          }
        }
      }
      const A total = sum_over<A>(g.samples, [&](int64_t s) {
        V top(-std::numeric_limits<A>::infinity());
        Sum<V> sums, joint;
        for (int64_t j = 0; j < K; ++j) top = at::vec::maximum(top, V::loadu(a + j * pitch + s) + V(log_prior[j]));
        for (int64_t j = 0; j < K; ++j) {
          const V e = (V::loadu(a + j * pitch + s) + V(log_prior[j]) - top).exp();
          e.store(p + j * pitch + s);
          sums.add(e);
        }
        const V sum = sums.get();
        for (int64_t j = 0; j < K; ++j) {
          const V posterior = V::loadu(p + j * pitch + s) / sum;  // Eq. 4.18, 4.20
          posterior.store(p + j * pitch + s);
          for (int64_t v = 0; v < views; ++v) {
            const V log_likelihood = log_sigmoid(V::loadu(a + (v * K + j) * pitch + s) * V(over_gamma));
            joint.add(posterior * (V(std::max(log_prior[j], least)) + log_likelihood));  // Eq. 4.21, 4.23
          }
        }
        return joint.get();
      });
      losses[i] = -weight * total;
      turn_back(p, g, pitch, posteriors + i * K);
    });
  });
  return result;
}

std::tuple<at::Tensor, at::Tensor> mixture_em_loss_backward(
    const at::Tensor& scores, const OptionalTensor& scores_aug, const at::Tensor& posterior, const at::Tensor& means,
    const at::Tensor& scales, const at::Tensor& grad_loss, double gamma, bool batch_statistics) {
  const Mixtures g(scores, scores_aug);
  check_mixture(posterior, scores, scores.sizes(), g.type);
  check_mixture(means, scores, g.statistics, g.type);
  check_mixture(scales, scores, g.statistics, g.type);
  check_mixture(grad_loss, scores, g.losses(), g.type);
  auto result = empty_mixture_grads(scores, scores_aug);
  auto& [grad, grad_aug] = result;

  dispatch(scores.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    using V = at::vec::Vectorized<A>;
    const T* from[2] = {scores.const_data_ptr<T>(), data<T>(scores_aug)};
    T* to[2] = {grad.mutable_data_ptr<T>(), grad_aug.mutable_data_ptr<T>()};
    const A *posteriors = posterior.const_data_ptr<A>(), *grads = grad_loss.const_data_ptr<A>();
    const A *mus = means.const_data_ptr<A>(), *rhos = scales.const_data_ptr<A>();
    const int64_t K = g.clusters, views = g.statistics[0], stride = g.stride();
    const int64_t pitch = row_pitch<V>(g.samples);
    const A weight = static_cast<A>(g.weight()), over_gamma = static_cast<A>(1 / gamma);

    for_mixtures(g, [&](int64_t i) {
      // [K][pitch] of scores, then of p, and [pitch] of dL/da*
      const Scratch<A> scratch((2 * K + 1) * pitch);
      A *const a = scratch.data(), *const p = a + K * pitch, *const inner = p + K * pitch;
      const V factor(-grads[i] * weight * over_gamma);
      turn(posteriors + i * K, g, pitch, p);
      for (int64_t v = 0; v < views; ++v) {
        turn(from[v] + i * K, g, pitch, a);
        for (int64_t j = 0; j < K; ++j) {
          A* column = a + j * pitch;
          const V mu(mus[v * stride + i * K + j]), rho(rhos[v * stride + i * K + j]);
          for (int64_t s = 0; s < g.samples; s += V::size()) {
            const V z = (V::loadu(column + s) - mu) * rho;
            z.store(column + s);
            // dL/da* = −p sigmoid(−a*/γ) / (N γ), with p constant.
            (factor * V::loadu(p + j * pitch + s) * sigmoid(z.neg() * V(over_gamma))).store(inner + s);
          }
          A along_one = 0, along_a = 0;  // through μ and σ: remove these components from each column
          if (batch_statistics) {
            along_one = weight * sum_over<A>(g.samples, [&](int64_t s) { return V::loadu(inner + s); });
            along_a = weight * sum_over<A>(g.samples, [&](int64_t s) {
                        return V::loadu(column + s) * V::loadu(inner + s);
                      });
          }
          for (int64_t s = 0; s < g.samples; s += V::size()) {
            const V d = V::loadu(inner + s) - V(along_one) - V::loadu(column + s) * V(along_a);
            (d * rho).store(column + s);
          }
        }
        turn_back(a, g, pitch, to[v] + i * K);
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("mixture_em_loss", &fastroute::mixture_em_loss);
  m.impl("mixture_em_loss_backward", &fastroute::mixture_em_loss_backward);
}
