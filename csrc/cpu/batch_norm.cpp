// Batch normalisation with the addition and the ReLU behind it, and its backward: two passes over the maps each.

#include "cpu/lines.h"
#include "cpu/memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>

namespace fastroute {
namespace {

// The gradient before the ReLU: zero where y ≤ 0; that of NaN is kept, as by PyTorch.
template <bool kRelu, typename T>
Pack<T> masked(Pack<T> grad, const T* y, int64_t tail) {
  using Part = typename Pack<T>::Part;
  if constexpr (kRelu) {
    const Pack<T> mask = load(y, tail);
    for (int h = 0; h < Pack<T>::kParts; ++h) {
      grad.part[h] = Part::blendv(grad.part[h], Part(0), mask.part[h] <= Part(0));
    }
  }
  return grad;
}

// Mean and variance of each channel. Each block has a center of its own, its mean, about which its sums are taken in a second read
// from cache, so that a mean which is large beside the deviations costs no accuracy. Blocks are joined in order, whatever the number
// of threads.
template <typename T>
void moments(const at::Tensor& x, const Lines<T>& lines, double* mean, double* variance) {
  using A = accumulate_t<T>;
  using P = Pack<T>;
  const int64_t channels = lines.g.channels, blocks = lines.all_blocks();
  std::vector<A> zeros(channels), centers(blocks * channels), firsts(blocks * channels), seconds(blocks * channels);
  lines.parallel([&](const auto& units) {
    Scratch<T, 1> of_sums(lines);
    Scratch<T, 2> of_squares(lines);
    units([&](const auto& unit) {
      const T* sample = x.const_data_ptr<T>() + unit.sample * x.stride(0);
      const int64_t b = unit.index * channels;
      const auto add = [&](int64_t e, int64_t tail, const P&, std::array<P, 1>& to) {
        const P p = load(sample + e, tail);
        for (int h = 0; h < P::kParts; ++h) to[0].part[h] = to[0].part[h] + p.part[h];
      };
      add_up<T, 1>(lines, unit, zeros.data(), {centers.data() + b}, of_sums, add);
      const int64_t c0 = lines.last ? 0 : unit.line, c1 = lines.last ? channels : unit.line + 1;
      for (int64_t c = c0; c < c1; ++c) centers[b + c] /= static_cast<A>(lines.count(unit.block));
      const auto add_squares = [&](int64_t e, int64_t tail, const P& m, std::array<P, 2>& to) {
        const P p = load(sample + e, tail);
        for (int h = 0; h < P::kParts; ++h) {
          const auto d = p.part[h] - m.part[h];
          to[0].part[h] = to[0].part[h] + d;
          to[1].part[h] = at::vec::fmadd(d, d, to[1].part[h]);
        }
      };
      add_up<T, 2>(
          lines, unit, centers.data() + b, {firsts.data() + b, seconds.data() + b}, of_squares, add_squares);
    });
  });
  const double all = static_cast<double>(lines.g.batch * lines.g.size);
  std::fill_n(mean, channels, 0.0);
  std::fill_n(variance, channels, 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    const double share = static_cast<double>(lines.count(b)) / all;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t k = b * channels + c;
      mean[c] += share * static_cast<double>(centers[k]) + static_cast<double>(firsts[k]) / all;
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const double share = static_cast<double>(lines.count(b)) / all;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t k = b * channels + c;
      const double off = static_cast<double>(centers[k]) - mean[c];
      variance[c] += (static_cast<double>(seconds[k]) + 2 * off * static_cast<double>(firsts[k])) / all + share * off * off;
    }
  }
  for (int64_t c = 0; c < channels; ++c) variance[c] = variance[c] < 0 ? 0 : variance[c];  // keeps NaN
}

// y = max((x − center) scale + shift + residual, 0), without the maximum unless kRelu. Parameters are those of channels.
template <bool kRelu, bool kResidual, typename T>
void apply(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& y, const Lines<T>& lines,
    const accumulate_t<T>* center, const accumulate_t<T>* scale, const accumulate_t<T>* shift) {
  using P = Pack<T>;
  const T *from = x.const_data_ptr<T>(), *other = kResidual ? residual.const_data_ptr<T>() : nullptr;
  T* to = y.mutable_data_ptr<T>();
  transform<T, 3>(lines, {center, scale, shift}, [&](int64_t s) {
    const T *in = from + s * x.stride(0), *add = kResidual ? other + s * residual.stride(0) : nullptr;
    T* out = to + s * y.stride(0);
    return [=](int64_t e, int64_t tail, const std::array<P, 3>& of) {
      P p = load(in + e, tail);
      for (int h = 0; h < P::kParts; ++h) {
        p.part[h] = at::vec::fmadd(p.part[h] - of[0].part[h], of[1].part[h], of[2].part[h]);
      }
      if constexpr (kResidual) {
        const P q = load(add + e, tail);
        for (int h = 0; h < P::kParts; ++h) p.part[h] = p.part[h] + q.part[h];
      }
      if constexpr (kRelu) p.rectify();
      store(p, out + e, tail);
    };
  });
}

// sums[0][c] = Σ dP and sums[1][c] = Σ dP (x − mean), where dP is dY before the ReLU.
template <bool kRelu, typename T>
void sum_gradients(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& x, const Lines<T>& lines,
    const accumulate_t<T>* mean, double* of_grad, double* of_product) {
  using A = accumulate_t<T>;
  using P = Pack<T>;
  const int64_t channels = lines.g.channels, blocks = lines.all_blocks();
  std::vector<A> firsts(blocks * channels), seconds(blocks * channels);
  const T *dy = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *mask = kRelu ? y.const_data_ptr<T>() : nullptr;
  lines.parallel([&](const auto& units) {
    Scratch<T, 2> scratch(lines);
    units([&](const auto& unit) {
      const int64_t s = unit.sample, b = unit.index * channels;
      const T *g = dy + s * grad.stride(0), *in = from + s * x.stride(0);
      const T* sign = kRelu ? mask + s * y.stride(0) : nullptr;
      const auto add = [&](int64_t e, int64_t tail, const P& m, std::array<P, 2>& to) {
        const P d = masked<kRelu, T>(load(g + e, tail), kRelu ? sign + e : nullptr, tail), p = load(in + e, tail);
        for (int h = 0; h < P::kParts; ++h) {
          to[0].part[h] = to[0].part[h] + d.part[h];
          to[1].part[h] = at::vec::fmadd(d.part[h], p.part[h] - m.part[h], to[1].part[h]);
        }
      };
      add_up<T, 2>(lines, unit, mean, {firsts.data() + b, seconds.data() + b}, scratch, add);
    });
  });
  std::fill_n(of_grad, channels, 0.0);
  std::fill_n(of_product, channels, 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      of_grad[c] += static_cast<double>(firsts[b * channels + c]);
      of_product[c] += static_cast<double>(seconds[b * channels + c]);
    }
  }
}

// dX = dP scale + (x − center) slope + shift, or dP scale without batch statistics; dR = dP if kResidual.
template <bool kRelu, bool kResidual, bool kBatch, typename T>
void apply_gradients(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& x, const at::Tensor& grad_x,
    const at::Tensor& grad_residual, const Lines<T>& lines, const accumulate_t<T>* center, const accumulate_t<T>* scale,
    const accumulate_t<T>* slope, const accumulate_t<T>* shift) {
  using P = Pack<T>;
  const T *dy = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *mask = kRelu ? y.const_data_ptr<T>() : nullptr;
  T *dx = grad_x.mutable_data_ptr<T>(), *dr = kResidual ? grad_residual.mutable_data_ptr<T>() : nullptr;
  transform<T, 4>(lines, {center, scale, slope, shift}, [&](int64_t s) {
    const T *g = dy + s * grad.stride(0), *in = from + s * x.stride(0);
    const T* sign = kRelu ? mask + s * y.stride(0) : nullptr;
    T* to_x = dx + s * grad_x.stride(0);
    T* to_residual = kResidual ? dr + s * grad_residual.stride(0) : nullptr;
    return [=](int64_t e, int64_t tail, const std::array<P, 4>& of) {
      P p = masked<kRelu, T>(load(g + e, tail), kRelu ? sign + e : nullptr, tail);
      if constexpr (kResidual) store(p, to_residual + e, tail);
      if constexpr (kBatch) {
        const P q = load(in + e, tail);
        for (int h = 0; h < P::kParts; ++h) {
          const auto rest = at::vec::fmadd(q.part[h] - of[0].part[h], of[2].part[h], of[3].part[h]);
          p.part[h] = at::vec::fmadd(p.part[h], of[1].part[h], rest);
        }
      } else {
        for (int h = 0; h < P::kParts; ++h) p.part[h] = p.part[h] * of[1].part[h];
      }
      store(p, to_x + e, tail);
    };
  });
}

// Calls f(true_type or false_type, …) for the values.
template <typename F, typename... Rest>
void choose(const F& f, bool value, Rest... rest) {
  const auto next = [&](auto constant) {
    const auto bound = [&](auto... others) { f(constant, others...); };
    if constexpr (sizeof...(rest) == 0) {
      bound();
    } else {
      choose(bound, rest...);
    }
  };
  value ? next(std::true_type()) : next(std::false_type());
}

int64_t check_maps(const at::Tensor& x, at::TensorList others) {
  aligned_path(x);
  const auto sizes = x.sizes().slice(1);
  TORCH_CHECK(
      x.is_cpu() && std::find(sizes.begin(), sizes.end(), 0) == sizes.end(),
      "maps must be on the CPU, and only the batch may be empty");
  for (const at::Tensor& other : others) {
    if (other.defined()) check_aligned(other, x);
  }
  return x.size(1);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm(
    const at::Tensor& x, const OptionalTensor& residual_, const OptionalTensor& weight_, const OptionalTensor& bias_,
    const OptionalTensor& mean_, const OptionalTensor& variance_, double eps, bool relu) {
  const at::Tensor residual = residual_.value_or(at::Tensor());
  const int64_t channels = check_maps(x, {residual});
  TORCH_CHECK(mean_.has_value() == variance_.has_value(), "mean and variance are given together");
  const auto type = accumulate_type(x.scalar_type());
  const at::Tensor weight = parameter(weight_, type, {channels}, x), bias = parameter(bias_, type, {channels}, x);
  at::Tensor y = allocate_paths(x, 1)[0];
  at::Tensor mean = parameter(mean_, type, {channels}, x), variance = parameter(variance_, type, {channels}, x);
  const bool batch = !mean.defined();
  if (batch) {
    mean = at::empty({channels}, x.options().dtype(type));
    variance = at::empty_like(mean);
  }
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Lines<T> lines({x, residual});
    std::vector<double> means(channels), variances(channels);
    if (batch) {
      moments(x, lines, means.data(), variances.data());
      std::copy(means.begin(), means.end(), mean.mutable_data_ptr<A>());
      std::copy(variances.begin(), variances.end(), variance.mutable_data_ptr<A>());
    } else {
      std::copy_n(data<A>(mean), channels, means.begin());
      std::copy_n(data<A>(variance), channels, variances.begin());
    }
    std::vector<A> center(channels), scale(channels), shift(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double gain = weight.defined() ? static_cast<double>(data<A>(weight)[c]) : 1;
      center[c] = static_cast<A>(means[c]);
      const double factor = gain / std::sqrt(variances[c] + eps);
      scale[c] = static_cast<A>(factor);
      // Corrects for the rounding of the mean to A.
      const double rest = (static_cast<double>(center[c]) - means[c]) * factor;
      shift[c] = static_cast<A>((bias.defined() ? static_cast<double>(data<A>(bias)[c]) : 0) + rest);
    }
    choose(
        [&](auto rectifies, auto adds) {
          apply<rectifies(), adds(), T>(x, residual, y, lines, center.data(), scale.data(), shift.data());
        },
        relu, residual.defined());
  });
  if (!batch) {  // results may be neither arguments nor each other
    mean = at::empty({0}, mean.options());
    variance = at::empty_like(mean);
  }
  return {std::move(y), std::move(mean), std::move(variance)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_backward(
    const at::Tensor& grad_, const OptionalTensor& y_, const at::Tensor& x, const OptionalTensor& weight_,
    const at::Tensor& mean_, const at::Tensor& variance_, double eps, bool batch, bool residual) {
  const at::Tensor y = y_.value_or(at::Tensor());
  TORCH_CHECK(grad_.defined(), "the gradient is missing");
  const int64_t channels = check_maps(x, {y});
  const Aligned aligned(grad_, x);
  const at::Tensor& grad = aligned[0];
  check_aligned(grad, x);
  const auto type = accumulate_type(x.scalar_type());
  const at::Tensor weight = parameter(weight_, type, {channels}, x), mean = parameter(mean_, type, {channels}, x);
  const at::Tensor variance = parameter(variance_, type, {channels}, x);
  at::Tensor grad_x = allocate_paths(x, 1)[0];
  at::Tensor grad_residual = residual ? allocate_paths(x, 1)[0] : at::empty({0}, x.options());
  at::Tensor grad_weight = at::empty({channels}, x.options().dtype(type)), grad_bias = at::empty_like(grad_weight);
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Lines<T> lines({x, grad, y});
    const double count = static_cast<double>(lines.g.batch * lines.g.size);
    std::vector<double> of_grad(channels), of_product(channels);
    choose(
        [&](auto rectified) {
          sum_gradients<rectified(), T>(grad, y, x, lines, data<A>(mean), of_grad.data(), of_product.data());
        },
        y.defined());
    std::vector<A> scale(channels), slope(channels), shift(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const double gain = weight.defined() ? static_cast<double>(data<A>(weight)[c]) : 1;
      const double inverse = 1 / std::sqrt(static_cast<double>(data<A>(variance)[c]) + eps);
      grad_bias.mutable_data_ptr<A>()[c] = static_cast<A>(of_grad[c]);
      grad_weight.mutable_data_ptr<A>()[c] = static_cast<A>(of_product[c] * inverse);
      scale[c] = static_cast<A>(gain * inverse);
      slope[c] = static_cast<A>(-gain * inverse * inverse * inverse * of_product[c] / count);
      shift[c] = static_cast<A>(-gain * inverse * of_grad[c] / count);
    }
    choose(
        [&](auto rectified, auto added, auto of_batch) {
          apply_gradients<rectified(), added(), of_batch(), T>(
              grad, y, x, grad_x, grad_residual, lines, data<A>(mean), scale.data(), slope.data(), shift.data());
        },
        y.defined(), residual, batch);
  });
  return {std::move(grad_x), std::move(grad_residual), std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("batch_norm", &fastroute::batch_norm);
  m.impl("batch_norm_backward", &fastroute::batch_norm_backward);
}
