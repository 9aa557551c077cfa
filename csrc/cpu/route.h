// Passes over all samples, from which the operators are built.

#pragma once

#include "cpu/loops.h"
#include "cpu/memory.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <vector>

namespace fastroute {

// Total size of outputs above which non-temporal stores are used, so that a cache line need not be read before it is written;
// the constants below are exceptions for some forwards. Compared with 8 MiB, this saved 5 % at the CIFAR stages at batch 128
// and had no effect on a training step of resnet20_cc2.
constexpr int64_t kStreamBytes = int64_t{1} << 20;

// Total size of inputs and outputs up to which a forward without a known backward uses cached stores, so that the next layer
// or call finds them in cache. In a loop this took 0.64 to 1.09 of the time, at 49 MiB 1.3; L3 had 32 MiB. Before a backward in
// the same loop it cost 10 to 17 %, and in a compiled training step, which cannot be distinguished from inference, nothing
// measurable.
constexpr int64_t kInferenceBytes = int64_t{24} << 20;

// Same as kStreamBytes if all threads share a few samples: these and their outputs fit in a cache from which the next layer
// reads at once.
constexpr int64_t kSharedStreamBytes = int64_t{16} << 20;

// Bytes that surely fit in a core's private cache.
constexpr int64_t kCacheBytes = int64_t{768} << 10;

// Bytes of work that amortise waking another thread.
constexpr int64_t kGrainBytes = int64_t{32} << 10;

template <typename F>
void for_samples(const Geometry& g, int64_t paths, int64_t itemsize, const F& f) {
  const int64_t bytes = std::max<int64_t>(1, paths * g.elements() * itemsize);
  at::parallel_for(0, g.batch, std::max<int64_t>(1, kGrainBytes / bytes), f);
}

// Returns whether these outputs use non-temporal stores: they are large, and every sample is aligned to registers.
template <typename T>
bool streamable(const Paths<T>& ys, const Geometry& g, int64_t least = kStreamBytes) {
  constexpr int64_t kAlignment = Pack<T>::kSize * sizeof(T);
  bool aligned = ys.count * g.batch * g.elements() * static_cast<int64_t>(sizeof(T)) > least;
  for (int64_t j = 0; j < ys.count; ++j) {
    aligned = aligned && reinterpret_cast<uintptr_t>(ys.data[j]) % kAlignment == 0 &&
        ys.stride[j] * static_cast<int64_t>(sizeof(T)) % kAlignment == 0;
  }
  return aligned;
}

// Returns whether samples are so few and so large that all threads work on each together.
inline bool shares_samples(const Geometry& g, int64_t paths, int64_t itemsize) {
  return g.batch < at::get_num_threads() && paths * g.elements() * itemsize > 8 * kGrainBytes;
}

// Returns whether a forward from m paths uses non-temporal stores.
template <typename T>
bool streams_forward(const Paths<T>& ys, int64_t m, const Geometry& g) {
  if (shares_samples(g, m + ys.count, sizeof(T))) return streamable(ys, g, kSharedStreamBytes);
  const bool backward_follows = at::GradMode::is_enabled();  // restored by csrc/ops/autograd.h
  return streamable(ys, g, backward_follows ? kStreamBytes : kInferenceBytes * ys.count / (m + ys.count));
}

// How the backward adds a channel's value: once per row of pixels if rows are long, else from a vector with one value per
// element.
template <typename T>
Addend addend_of(const Geometry& g) {
  return !g.channels_last && g.size >= 2 * Pack<T>::kSize ? Addend::kRow : Addend::kElement;
}

// Returns whether two consecutive samples fit in cache together.
inline bool looks_ahead(const Geometry& g, int64_t paths, int64_t itemsize) {
  return g.batch > 1 && 2 * paths * g.elements() * itemsize <= kCacheBytes;
}

// Runs f(begin, count) over [0, total) in blocks, in reverse order: the previous pass went forward, so that the end of the
// sample is still in cache.
template <typename F>
void backwards(int64_t total, int64_t block, const F& f) {
  for (int64_t begin = (total - 1) / block * block; begin >= 0; begin -= block) f(begin, std::min(block, total - begin));
}

// Prefetches the next sample, if any, while a sample is written, if two fit in cache together.
template <typename T>
void look_ahead(
    WeightedSums<T>& sums, std::initializer_list<const Paths<const T>*> inputs, int64_t next, const Geometry& g) {
  int64_t paths = 0;
  for (const auto* input : inputs) paths += input->count;
  sums.ahead_count = 0;
  if (next < 0 || next >= g.batch || !looks_ahead(g, paths, sizeof(T))) return;
  for (const auto* input : inputs) {
    for (int64_t i = 0; i < input->count; ++i) sums.ahead[sums.ahead_count++] = input->sample(next)[i];
  }
}

// weights[j][i] of one sample from a row-major (m, n) matrix whose [i][j] is the weight of input i in output j.
template <typename A, typename Weights>
void transpose_weights(const A* gates, int64_t m, int64_t n, Weights& weights) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) weights[j][i] = gates[i * n + j];
}

template <typename A, typename Weights>
void copy_weights(const A* gates, int64_t m, int64_t n, Weights& weights) {
  for (int64_t i = 0; i < m; ++i) std::copy_n(gates + i * n, n, weights[i].begin());
}

// Means over space (N, m, C), with all threads on each sample.
template <bool kRelu, typename T>
void pool_together(const Paths<const T>& xs, const Geometry& g, accumulate_t<T>* pooled) {
  using A = accumulate_t<T>;
  const A size = static_cast<A>(g.size);
  const int64_t maps = g.batch * xs.count;
  const auto map = [&](int64_t k) { return xs.data[k % xs.count] + k / xs.count * xs.stride[k % xs.count]; };
  if (!g.channels_last) {
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / (g.size * static_cast<int64_t>(sizeof(T))));
    at::parallel_for(0, maps * g.channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        pooled[k] = sum<kRelu>(map(k / g.channels) + k % g.channels * g.size, g.size) / size;
      }
    });
    return;
  }
  // Nor does the number of blocks depend on the number of threads; the choice of this function does.
  constexpr int64_t kBlocks = 8;
  const int64_t least = std::max<int64_t>(1, kGrainBytes / (g.channels * static_cast<int64_t>(sizeof(T))));
  const int64_t pixels = std::max(least, (g.size + kBlocks - 1) / kBlocks), blocks = (g.size + pixels - 1) / pixels;
  std::vector<A> parts(maps * blocks * g.channels);
  at::parallel_for(0, maps * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(g.channels);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k % blocks * pixels;
      add_many_rows<kRelu>(
          map(k / blocks) + first * g.channels, std::min(pixels, g.size - first), g.channels,
          parts.data() + k * g.channels, scratch.data());
    }
  });
  std::fill_n(pooled, maps * g.channels, A(0));
  for (int64_t k = 0; k < maps; ++k) {
    A* total = pooled + k * g.channels;
    add_rows<false>(parts.data() + k * blocks * g.channels, blocks, g.channels, total);
    for (int64_t c = 0; c < g.channels; ++c) total[c] /= size;
  }
}

// y_j = Σ_i weights[i][j] x_i with weights (m, n) for each sample, with all threads on each sample (Eq. 3.7).
template <bool kRelu = false, typename T>
void mix_together(
    const Paths<const T>& xs, const accumulate_t<T>* weights, int64_t weights_stride, const Paths<T>& ys,
    const Geometry& g, bool stream) {
  const auto run = WeightedSums<T>::template choose<Addend::kNone, kRelu>(xs.count, stream);
  const int64_t blocks = (g.elements() + kBlock - 1) / kBlock;
  at::parallel_for(0, g.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    WeightedSums<T> sums;
    sums.n = ys.count;
    int64_t prepared = -1;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t s = k / blocks, first = k % blocks * kBlock;
      if (s != prepared) {
        sums.xs = xs.sample(s);
        sums.ys = ys.sample(s);
        transpose_weights(weights + s * weights_stride, xs.count, ys.count, sums.weights);
        prepared = s;
      }
      const int64_t count = std::min(kBlock, g.elements() - first);
      (sums.*run)(first, count, count);
    }
    stream_fence();
  });
}

// y_j = Σ_i weights[j][i] x_i over one sample (Eq. 3.7).
template <bool kRelu = false, typename T>
void mix_sample(const WeightedSums<T>& sums, int64_t m, const Geometry& g, bool stream) {
  const auto run = WeightedSums<T>::template choose<Addend::kNone, kRelu>(m, stream);
  backwards(g.elements(), kBlock, [&](int64_t e, int64_t count) { (sums.*run)(e, count, count); });
}

// y_j = Σ_i weights[j][i] x_i + values[j][channel] over one sample (Eq. 3.15). scratch is free for use.
template <bool kRelu, typename T>
void mix_sample(
    WeightedSums<T>& sums, const accumulate_t<T>* values, int64_t m, const Geometry& g, bool stream,
    std::vector<accumulate_t<T>>& scratch) {
  using W = WeightedSums<T>;
  constexpr int64_t kAlignment = Pack<T>::kSize;
  if (addend_of<T>(g) == Addend::kRow) {
    const auto run = W::template choose<Addend::kRow, kRelu>(m, stream);
    sums.addend = values;
    sums.addend_stride = g.channels;
    backwards(g.elements(), kBlock, [&](int64_t e, int64_t count) { (sums.*run)(e, count, g.size); });
    return;
  }
  // The values are expanded to rows of several pixels (channels_last) or of the whole sample, so that vectors are full even for
  // few channels or a small space.
  const int64_t unit = g.channels_last ? g.channels : g.size;
  const int64_t units = g.channels_last ? fold_of<T>(g) : g.channels;
  const int64_t width = unit * units;
  scratch.resize(sums.n * width);
  for (int64_t j = 0; j < sums.n; ++j) {
    for (int64_t u = 0; u < units; ++u) {
      accumulate_t<T>* to = scratch.data() + j * width + u * unit;
      if (g.channels_last) {
        std::copy_n(values + j * g.channels, unit, to);
      } else {
        std::fill_n(to, unit, values[j * g.channels + u]);
      }
    }
  }
  sums.addend = scratch.data();
  sums.addend_stride = width;
  const auto run = W::template choose<Addend::kElement, kRelu>(m, stream && width % kAlignment == 0);
  const int64_t whole = g.elements() / width;
  if (const int64_t rest = g.elements() - whole * width) (sums.*run)(whole * width, rest, rest);
  backwards(whole, std::max<int64_t>(1, kBlock / width), [&](int64_t row, int64_t count) {
    (sums.*run)(row * width, count * width, width);
  });
}

// Inner products of every path with every path over one sample (Eq. 3.10).
template <bool kRelu = false, typename T>
std::array<std::array<double, kMaxPaths>, kMaxPaths> inner_products_of_sample(
    const Pointers<const T>& xs, int64_t m, const Pointers<const T>& ys, int64_t n, const Geometry& g) {
  std::array<std::array<double, kMaxPaths>, kMaxPaths> total{};
  for (int64_t e = 0; e < g.elements(); e += kBlock) {
    inner_products<kRelu>(advance(xs, m, e), m, advance(ys, n, e), n, std::min(kBlock, g.elements() - e), total);
  }
  return total;
}

}  // namespace fastroute
