// Batch normalisation with the addition and the ReLU behind it, and its backward: two passes over the maps each.

#include "cpu/loops.h"
#include "cpu/memory.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

namespace fastroute {
namespace {

// Adjacent vectors whose sums and parameters stay in registers.
template <typename T>
constexpr int kColumns = (Pack<T>::Part::size() >= 16 ? 4 : 2) / Pack<T>::kParts;

template <typename T>
constexpr int64_t kWidth = kColumns<T> * Pack<T>::kSize;

// Maps as matrices whose columns have the same parameters in every row. In channels_last a row has the channels of one or
// several pixels, and a block of pixels is one line. Else a line has the pixels of one channel, in rows of a few vectors.
template <typename T>
struct Lines {
  // Bytes of a block of pixels, which is read twice, and the least number of pixels that keeps its sums few.
  static constexpr int64_t kBytes = int64_t{64} << 10, kLeastPixels = 64;

  Geometry g;
  bool last;
  int64_t fold, width, lines, pixels, blocks;

  // `maps` are of one shape and layout. Samples that follow one another in channels_last are one sample.
  explicit Lines(at::TensorList maps) : g(maps[0]), last(g.channels_last || g.size == 1) {
    const auto follows = [&](const at::Tensor& x) { return !x.defined() || x.stride(0) == g.elements(); };
    if (last && g.batch > 1 && std::all_of(maps.begin(), maps.end(), follows)) {
      g.size *= g.batch;
      g.batch = 1;
    }
    fold = last ? std::clamp<int64_t>(kWidth<T> / g.channels, 1, g.size) : 1;
    width = last ? fold * g.channels : kWidth<T>;
    lines = last ? 1 : g.channels;
    pixels = std::min(g.size, std::max(kLeastPixels, kBytes / g.channels / static_cast<int64_t>(sizeof(T))));
    blocks = (g.size + pixels - 1) / pixels;
  }

  // Columns, so many that whole vectors can be read.
  int64_t padded() const { return (width + Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize; }
  int64_t count(int64_t block) const { return std::min(pixels, g.size - block * pixels); }

  // Calls f(offset in the sample, rows, columns) for the rows of a line of a block and for the remaining columns.
  template <typename F>
  void each(int64_t block, int64_t line, const F& f) const {
    const int64_t unit = last ? fold : width, whole = count(block) / unit, rest = count(block) % unit;
    const int64_t offset = last ? block * pixels * g.channels : line * g.size + block * pixels;
    if (whole) f(offset, whole, width);
    if (rest) f(offset + whole * width, last ? rest : 1, last ? g.channels : rest);
  }

  // Writes the parameter of every column of a line.
  template <typename A>
  void expand(const A* values, int64_t line, A* columns) const {
    if (!last) {
      std::fill_n(columns, width, values[line]);
      return;
    }
    for (int64_t k = 0; k < fold; ++k) std::copy_n(values, g.channels, columns + k * g.channels);
  }

  // Adds up the columns of each channel of a line.
  template <typename A>
  void reduce(const A* columns, int64_t line, A* sums) const {
    if (!last) {
      A sum = 0;
      for (int64_t k = 0; k < width; ++k) sum += columns[k];
      sums[line] = sum;
      return;
    }
    std::copy_n(columns, g.channels, sums);
    for (int64_t k = g.channels; k < width; k += g.channels) {
      for (int64_t c = 0; c < g.channels; ++c) sums[c] += columns[k + c];
    }
  }

  // Calls f(begin, end) for ranges of the blocks of all samples, in parallel.
  template <typename F>
  void parallel(const F& f) const {
    constexpr int64_t kGrainBytes = int64_t{32} << 10;
    const int64_t bytes = pixels * g.channels * static_cast<int64_t>(sizeof(T));
    at::parallel_for(0, g.batch * blocks, std::max<int64_t>(1, kGrainBytes / bytes), f);
  }
};

template <typename T>
Pack<T> load(const T* from, int64_t tail) {
  return tail ? Pack<T>::load(from, tail) : Pack<T>::load(from);
}

// A parameter of every column, zero past a tail. Arrays of parameters are padded to whole vectors.
template <typename T>
Pack<T> load_parameters(const accumulate_t<T>* from, int64_t tail) {
  using Part = typename Pack<T>::Part;
  constexpr int64_t kLanes = Part::size();
  Pack<T> pack;
  for (int h = 0; h < Pack<T>::kParts; ++h) {
    const int64_t count = tail ? std::clamp<int64_t>(tail - h * kLanes, 0, kLanes) : kLanes;
    pack.part[h] = count == kLanes ? Part::loadu(from + h * kLanes) : Part::loadu(from + h * kLanes, count);
  }
  return pack;
}

// Calls f(count of vectors, first column, columns of a last, partial vector or 0).
template <typename T, typename F>
void for_columns(int64_t width, const F& f) {
  constexpr int64_t kSize = Pack<T>::kSize;
  int64_t c = 0;
  for (; c + kWidth<T> <= width; c += kWidth<T>) f(std::integral_constant<int, kColumns<T>>(), c, int64_t{0});
  for (; c + kSize <= width; c += kSize) f(std::integral_constant<int, 1>(), c, int64_t{0});
  if (c < width) f(std::integral_constant<int, 1>(), c, width - c);
}

// Calls f(first row, end) for groups of rows that fit in L1 while their columns are taken in turn, so that memory is read in
// order; sums of many rows are sums of groups.
template <typename T, typename F>
void for_groups(int64_t rows, int64_t width, const F& f) {
  constexpr int64_t kGroupBytes = 16 << 10;
  const int64_t group = std::clamp<int64_t>(kGroupBytes / (width * static_cast<int64_t>(sizeof(T))), 8, 128);
  for (int64_t begin = 0; begin < rows; begin += group) f(begin, std::min(rows, begin + group));
}

// Adds K sums over rows to totals[k][column]; add(element, column, tail, sums) adds the terms of a vector.
template <typename T, int K, typename F>
void add_terms(int64_t rows, int64_t width, std::array<accumulate_t<T>*, K> totals, const F& add) {
  using P = Pack<T>;
  for_groups<T>(rows, width, [&](int64_t begin, int64_t end) {
    for_columns<T>(width, [&](auto vectors, int64_t c, int64_t tail) {
      constexpr int V = decltype(vectors)::value;
      std::array<P, K> sums[V];
      for (auto& each : sums)
        for (auto& sum : each) std::fill(std::begin(sum.part), std::end(sum.part), typename P::Part(0));
      for (int64_t r = begin; r < end; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) add(r * width + c + v * P::kSize, c + v * P::kSize, tail, sums[v]);
      }
      for (int v = 0; v < V; ++v) {
        for (int k = 0; k < K; ++k) {
          for (int h = 0; h < P::kParts; ++h) {
            accumulate_t<T>* to = totals[k] + c + v * P::kSize + h * P::Part::size();
            (P::Part::loadu(to) + sums[v][k].part[h]).store(to);
          }
        }
      }
    });
  });
}

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

template <typename T>
void store(const Pack<T>& pack, T* to, int64_t tail) {
  tail ? pack.store(to, tail) : pack.store(to);
}

// Mean and variance of each channel. Each block has a center of its own, its mean, about which its sums are taken in a second read
// from cache, so that a mean which is large beside the deviations costs no accuracy. Blocks are joined in order, whatever the number
// of threads.
template <typename T>
void moments(const at::Tensor& x, const Lines<T>& lines, double* mean, double* variance) {
  using A = accumulate_t<T>;
  using P = Pack<T>;
  const int64_t channels = lines.g.channels, blocks = lines.g.batch * lines.blocks;
  std::vector<A> centers(blocks * channels), firsts(blocks * channels), seconds(blocks * channels);
  lines.parallel([&](int64_t begin, int64_t end) {
    std::vector<A> first(lines.padded()), second(lines.padded()), center(lines.padded());
    for (int64_t b = begin; b < end; ++b) {
      const T* sample = x.const_data_ptr<T>() + b / lines.blocks * x.stride(0);
      const int64_t block = b % lines.blocks;
      A* center_b = centers.data() + b * channels;
      for (int64_t line = 0; line < lines.lines; ++line) {
        std::fill(first.begin(), first.end(), A(0));
        lines.each(block, line, [&](int64_t offset, int64_t rows, int64_t width) {
          add_terms<T, 1>(rows, width, {first.data()}, [&](int64_t e, int64_t, int64_t tail, std::array<P, 1>& to) {
            const P p = load(sample + offset + e, tail);
            for (int h = 0; h < P::kParts; ++h) to[0].part[h] = to[0].part[h] + p.part[h];
          });
        });
        lines.reduce(first.data(), line, center_b);
        const int64_t c0 = lines.last ? 0 : line, c1 = lines.last ? channels : line + 1;
        for (int64_t c = c0; c < c1; ++c) center_b[c] /= static_cast<A>(lines.count(block));
        lines.expand(center_b, line, center.data());
        std::fill(first.begin(), first.end(), A(0));
        std::fill(second.begin(), second.end(), A(0));
        lines.each(block, line, [&](int64_t offset, int64_t rows, int64_t width) {
          const auto add = [&](int64_t e, int64_t c, int64_t tail, std::array<P, 2>& to) {
            const P p = load(sample + offset + e, tail), m = load_parameters<T>(center.data() + c, tail);
            for (int h = 0; h < P::kParts; ++h) {
              const auto d = p.part[h] - m.part[h];
              to[0].part[h] = to[0].part[h] + d;
              to[1].part[h] = at::vec::fmadd(d, d, to[1].part[h]);
            }
          };
          add_terms<T, 2>(rows, width, {first.data(), second.data()}, add);
        });
        lines.reduce(first.data(), line, firsts.data() + b * channels);
        lines.reduce(second.data(), line, seconds.data() + b * channels);
      }
    }
  });
  const double all = static_cast<double>(lines.g.batch * lines.g.size);
  std::fill_n(mean, channels, 0.0);
  std::fill_n(variance, channels, 0.0);
  for (int64_t b = 0; b < blocks; ++b) {
    const double share = static_cast<double>(lines.count(b % lines.blocks)) / all;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t k = b * channels + c;
      mean[c] += share * static_cast<double>(centers[k]) + static_cast<double>(firsts[k]) / all;
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const double share = static_cast<double>(lines.count(b % lines.blocks)) / all;
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
  using A = accumulate_t<T>;
  using P = Pack<T>;
  const T *from = x.const_data_ptr<T>(), *other = kResidual ? residual.const_data_ptr<T>() : nullptr;
  T* to = y.mutable_data_ptr<T>();
  lines.parallel([&](int64_t begin, int64_t end) {
    const int64_t padded = lines.padded();
    std::vector<A> parameters(3 * padded);
    A *centers = parameters.data(), *scales = centers + padded, *shifts = scales + padded;
    const auto expand = [&](int64_t line) {
      lines.expand(center, line, centers);
      lines.expand(scale, line, scales);
      lines.expand(shift, line, shifts);
    };
    if (lines.last) expand(0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t s = b / lines.blocks;
      for (int64_t line = 0; line < lines.lines; ++line) {
        if (!lines.last) expand(line);
        lines.each(b % lines.blocks, line, [&](int64_t offset, int64_t rows, int64_t width) {
          const T* in = from + s * x.stride(0) + offset;
          const T* add = kResidual ? other + s * residual.stride(0) + offset : nullptr;
          T* out = to + s * y.stride(0) + offset;
          for_groups<T>(rows, width, [&](int64_t first, int64_t last) {
            for_columns<T>(width, [&](auto vectors, int64_t c, int64_t tail) {
              constexpr int V = decltype(vectors)::value;
              P m[V], a[V], o[V];
              for (int v = 0; v < V; ++v) {
                m[v] = load_parameters<T>(centers + c + v * P::kSize, tail);
                a[v] = load_parameters<T>(scales + c + v * P::kSize, tail);
                o[v] = load_parameters<T>(shifts + c + v * P::kSize, tail);
              }
              for (int64_t r = first; r < last; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                  const int64_t e = r * width + c + v * P::kSize;
                  P p = load(in + e, tail);
                  for (int h = 0; h < P::kParts; ++h) {
                    p.part[h] = at::vec::fmadd(p.part[h] - m[v].part[h], a[v].part[h], o[v].part[h]);
                  }
                  if constexpr (kResidual) {
                    const P q = load(add + e, tail);
                    for (int h = 0; h < P::kParts; ++h) p.part[h] = p.part[h] + q.part[h];
                  }
                  if constexpr (kRelu) p.rectify();
                  store(p, out + e, tail);
                }
              }
            });
          });
        });
      }
    }
  });
}

// sums[0][c] = Σ dP and sums[1][c] = Σ dP (x − mean), where dP is dY before the ReLU.
template <bool kRelu, typename T>
void sum_gradients(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& x, const Lines<T>& lines,
    const accumulate_t<T>* mean, double* of_grad, double* of_product) {
  using A = accumulate_t<T>;
  using P = Pack<T>;
  const int64_t channels = lines.g.channels, blocks = lines.g.batch * lines.blocks;
  std::vector<A> firsts(blocks * channels), seconds(blocks * channels);
  const T *dy = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *mask = kRelu ? y.const_data_ptr<T>() : nullptr;
  lines.parallel([&](int64_t begin, int64_t end) {
    std::vector<A> first(lines.padded()), second(lines.padded()), center(lines.padded());
    if (lines.last) lines.expand(mean, 0, center.data());
    for (int64_t b = begin; b < end; ++b) {
      const int64_t s = b / lines.blocks;
      for (int64_t line = 0; line < lines.lines; ++line) {
        if (!lines.last) lines.expand(mean, line, center.data());
        std::fill(first.begin(), first.end(), A(0));
        std::fill(second.begin(), second.end(), A(0));
        lines.each(b % lines.blocks, line, [&](int64_t offset, int64_t rows, int64_t width) {
          const T *g = dy + s * grad.stride(0) + offset, *in = from + s * x.stride(0) + offset;
          const T* sign = kRelu ? mask + s * y.stride(0) + offset : nullptr;
          const auto add = [&](int64_t e, int64_t c, int64_t tail, std::array<P, 2>& to) {
            const P d = masked<kRelu, T>(load(g + e, tail), kRelu ? sign + e : nullptr, tail), p = load(in + e, tail);
            const P m = load_parameters<T>(center.data() + c, tail);
            for (int h = 0; h < P::kParts; ++h) {
              to[0].part[h] = to[0].part[h] + d.part[h];
              to[1].part[h] = at::vec::fmadd(d.part[h], p.part[h] - m.part[h], to[1].part[h]);
            }
          };
          add_terms<T, 2>(rows, width, {first.data(), second.data()}, add);
        });
        lines.reduce(first.data(), line, firsts.data() + b * channels);
        lines.reduce(second.data(), line, seconds.data() + b * channels);
      }
    }
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
  using A = accumulate_t<T>;
  using P = Pack<T>;
  const T *dy = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *mask = kRelu ? y.const_data_ptr<T>() : nullptr;
  T *dx = grad_x.mutable_data_ptr<T>(), *dr = kResidual ? grad_residual.mutable_data_ptr<T>() : nullptr;
  lines.parallel([&](int64_t begin, int64_t end) {
    const int64_t padded = lines.padded();
    std::vector<A> parameters(4 * padded);
    A *centers = parameters.data(), *scales = centers + padded, *slopes = scales + padded, *shifts = slopes + padded;
    const auto expand = [&](int64_t line) {
      lines.expand(center, line, centers);
      lines.expand(scale, line, scales);
      lines.expand(slope, line, slopes);
      lines.expand(shift, line, shifts);
    };
    if (lines.last) expand(0);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t s = b / lines.blocks;
      for (int64_t line = 0; line < lines.lines; ++line) {
        if (!lines.last) expand(line);
        lines.each(b % lines.blocks, line, [&](int64_t offset, int64_t rows, int64_t width) {
          const T *g = dy + s * grad.stride(0) + offset, *in = from + s * x.stride(0) + offset;
          const T* sign = kRelu ? mask + s * y.stride(0) + offset : nullptr;
          T* to_x = dx + s * grad_x.stride(0) + offset;
          T* to_residual = kResidual ? dr + s * grad_residual.stride(0) + offset : nullptr;
          for_groups<T>(rows, width, [&](int64_t first, int64_t last) {
            for_columns<T>(width, [&](auto vectors, int64_t c, int64_t tail) {
              constexpr int V = decltype(vectors)::value;
              P m[V], a[V], d[V], o[V];
              for (int v = 0; v < V; ++v) {
                m[v] = load_parameters<T>(centers + c + v * P::kSize, tail);
                a[v] = load_parameters<T>(scales + c + v * P::kSize, tail);
                d[v] = load_parameters<T>(slopes + c + v * P::kSize, tail);
                o[v] = load_parameters<T>(shifts + c + v * P::kSize, tail);
              }
              for (int64_t r = first; r < last; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                  const int64_t e = r * width + c + v * P::kSize;
                  P p = masked<kRelu, T>(load(g + e, tail), kRelu ? sign + e : nullptr, tail);
                  if constexpr (kResidual) store(p, to_residual + e, tail);
                  if constexpr (kBatch) {
                    const P q = load(in + e, tail);
                    for (int h = 0; h < P::kParts; ++h) {
                      const auto rest = at::vec::fmadd(q.part[h] - m[v].part[h], d[v].part[h], o[v].part[h]);
                      p.part[h] = at::vec::fmadd(p.part[h], a[v].part[h], rest);
                    }
                  } else {
                    for (int h = 0; h < P::kParts; ++h) p.part[h] = p.part[h] * a[v].part[h];
                  }
                  store(p, to_x + e, tail);
                }
              }
            });
          });
        });
      }
    }
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
      // With what rounding takes off the mean.
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
    const at::Tensor& grad, const OptionalTensor& y_, const at::Tensor& x, const OptionalTensor& weight_,
    const at::Tensor& mean_, const at::Tensor& variance_, double eps, bool batch, bool residual) {
  const at::Tensor y = y_.value_or(at::Tensor());
  TORCH_CHECK(grad.defined(), "the gradient is missing");
  const int64_t channels = check_maps(x, {grad, y});
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
