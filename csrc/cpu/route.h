// The passes over all samples that the operators are built from.

#pragma once

#include "cpu/loops.h"

#include <ATen/Parallel.h>

#include <type_traits>
#include <vector>

namespace fastroute {

// Outputs larger than this in all are written past the caches: nothing would find them there.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// A channel of fewer pixels is not worth a call of its own.
constexpr int64_t kLongRow = 512;

// Bytes of work that pay for waking another thread.
constexpr int64_t kGrainBytes = int64_t{32} << 10;

template <typename F>
decltype(auto) dispatch(at::ScalarType type, F&& f) {
  switch (type) {
    case at::kFloat: return f.template operator()<float>();
    case at::kDouble: return f.template operator()<double>();
    case at::kBFloat16: return f.template operator()<at::BFloat16>();
    case at::kHalf: return f.template operator()<at::Half>();
    default: TORCH_CHECK(false, "paths of type ", type, " are not served");
  }
}

template <typename F>
void for_samples(const Geometry& g, int64_t paths, int64_t itemsize, const F& f) {
  const int64_t bytes = std::max<int64_t>(1, paths * g.elements() * itemsize);
  at::parallel_for(0, g.batch, std::max<int64_t>(1, kGrainBytes / bytes), f);
}

// Whether these outputs are written past the caches: they are large and every sample starts on a register's boundary.
template <typename T>
bool streamable(const Paths<T>& ys, const Geometry& g) {
  constexpr int64_t kAlignment = Pack<T>::kSize * sizeof(T);
  bool aligned = ys.count * g.batch * g.elements() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  for (int64_t j = 0; j < ys.count; ++j) {
    aligned = aligned && reinterpret_cast<uintptr_t>(ys.data[j]) % kAlignment == 0 &&
        ys.stride[j] * static_cast<int64_t>(sizeof(T)) % kAlignment == 0;
  }
  return aligned;
}

// Runs f(begin, count) over [0, total) in blocks, the last first: the pass before went forward, so that the end of the
// sample is what the cache still holds.
template <typename F>
void backwards(int64_t total, int64_t block, const F& f) {
  for (int64_t begin = (total - 1) / block * block; begin >= 0; begin -= block) f(begin, std::min(block, total - begin));
}

// y_j = Σ_i weights[j][i] x_i over one sample (Eq. 3.7).
template <typename T>
void mix_sample(
    const Pointers<const T>& xs, int64_t m, const typename WeightedSums<T>::Weights& weights, const Pointers<T>& ys,
    int64_t n, const Geometry& g, bool stream) {
  using W = WeightedSums<T>;
  const auto run = stream ? W::template choose<Addend::kNone, true>(m) : W::template choose<Addend::kNone, false>(m);
  backwards(g.elements(), kBlock, [&](int64_t e, int64_t count) {
    run(advance(xs, m, e), weights, {}, n, advance(ys, n, e), count);
  });
}

// y_j = Σ_i weights[j][i] x_i + addend[j][channel] over one sample (Eq. 3.15). scratch is free for use.
template <typename T>
void mix_sample(
    const Pointers<const T>& xs, int64_t m, const typename WeightedSums<T>::Weights& weights,
    const accumulate_t<T>* addend, const Pointers<T>& ys, int64_t n, const Geometry& g, bool stream,
    std::vector<accumulate_t<T>>& scratch) {
  using W = WeightedSums<T>;
  using A = accumulate_t<T>;
  constexpr int64_t kAlignment = Pack<T>::kSize;
  Addends<A> addends;
  if (!g.channels_last && g.size >= kLongRow) {
    const auto run = stream && g.size % kAlignment == 0 ? W::template choose<Addend::kScalar, true>(m)
                                                        : W::template choose<Addend::kScalar, false>(m);
    backwards(g.elements(), g.size, [&](int64_t e, int64_t count) {
      for (int64_t j = 0; j < n; ++j) addends.scalar[j] = addend[j * g.channels + e / g.size];
      run(advance(xs, m, e), weights, addends, n, advance(ys, n, e), count);
    });
    return;
  }
  // Pixels (channels_last) or channels in a block; the addend is written out to the block's width.
  const int64_t unit = g.channels_last ? g.channels : g.size;
  const int64_t units = std::clamp<int64_t>(kBlock / 4 / unit, 1, g.elements() / unit);
  const int64_t width = unit * units;
  scratch.resize(n * width);
  for (int64_t j = 0; j < n; ++j) addends.vector[j] = scratch.data() + j * width;
  const auto run = stream && width % kAlignment == 0 ? W::template choose<Addend::kVector, true>(m)
                                                     : W::template choose<Addend::kVector, false>(m);
  const auto fill = [&](int64_t first_channel, int64_t count) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t u = 0; u < count / unit; ++u) {
        A* to = scratch.data() + j * width + u * unit;
        if (g.channels_last) {
          std::copy_n(addend + j * g.channels, unit, to);
        } else {
          std::fill_n(to, unit, addend[j * g.channels + first_channel + u]);
        }
      }
    }
  };
  if (g.channels_last) fill(0, width);
  backwards(g.elements(), width, [&](int64_t e, int64_t count) {
    if (!g.channels_last) fill(e / unit, count);
    run(advance(xs, m, e), weights, addends, n, advance(ys, n, e), count);
  });
}

// Inner products of every path with every path over one sample (Eq. 3.10).
template <typename T>
std::array<std::array<double, kMaxPaths>, kMaxPaths> inner_products_of_sample(
    const Pointers<const T>& xs, int64_t m, const Pointers<const T>& ys, int64_t n, const Geometry& g) {
  std::array<std::array<double, kMaxPaths>, kMaxPaths> total{};
  for (int64_t e = 0; e < g.elements(); e += kBlock) {
    inner_products(advance(xs, m, e), m, advance(ys, n, e), n, std::min(kBlock, g.elements() - e), total);
  }
  return total;
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

}  // namespace fastroute
