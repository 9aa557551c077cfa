// Walks over the maps of a batch normalisation, whose parameters and sums are those of channels.

#pragma once

#include "cpu/loops.h"
#include "cpu/pack.h"
#include "paths.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

namespace fastroute {

// Adjacent vectors whose sums and parameters stay in registers.
template <typename T>
constexpr int kColumns = (Pack<T>::Part::size() >= 16 ? 4 : 2) / Pack<T>::kParts;

template <typename T>
constexpr int64_t kWidth = kColumns<T> * Pack<T>::kSize;

// Maps in lines of one or several channels, each in blocks of pixels, which are read twice. In channels_last a line has all
// channels: a matrix of pixels whose columns have the same parameters in every row. Else it has one channel.
template <typename T>
struct Lines {
  // In channels_last, the bytes of a block and the least pixels that keep its sums few; else the pixels of a block.
  static constexpr int64_t kBytes = int64_t{64} << 10, kLeastPixels = 64, kLinePixels = 8192;

  Geometry g;
  bool last;
  int64_t fold, width, lines, pixels, blocks;  // a row has `width` columns, which are `fold` pixels

  // A block of a line. `index` counts the blocks of all samples.
  struct Unit {
    int64_t sample, line, block, index;
  };

  // `maps` are of one shape and layout. Samples that follow one another in channels_last are one sample.
  explicit Lines(at::TensorList maps) : g(maps[0]), last(g.channels_last || g.size == 1) {
    const auto follows = [&](const at::Tensor& x) { return !x.defined() || x.stride(0) == g.elements(); };
    if (last && g.batch > 1 && std::all_of(maps.begin(), maps.end(), follows)) {
      g.size *= g.batch;
      g.batch = 1;
    }
    fold = last ? std::clamp<int64_t>(kWidth<T> / g.channels, 1, g.size) : 1;
    width = last ? fold * g.channels : Pack<T>::kSize;
    lines = last ? 1 : g.channels;
    const int64_t most = last ? std::max(kLeastPixels, kBytes / g.channels / static_cast<int64_t>(sizeof(T))) : kLinePixels;
    pixels = std::min(g.size, most);
    blocks = (g.size + pixels - 1) / pixels;
  }

  // Columns, so many that whole vectors can be read.
  int64_t padded() const { return (width + Pack<T>::kSize - 1) / Pack<T>::kSize * Pack<T>::kSize; }
  int64_t all_blocks() const { return g.batch * blocks; }
  int64_t count(int64_t block) const { return std::min(pixels, g.size - block % blocks * pixels); }

  // Offset of a unit in its sample.
  int64_t offset(const Unit& unit) const {
    return last ? unit.block * pixels * g.channels : unit.line * g.size + unit.block * pixels;
  }

  // In channels_last, calls f(offset in the sample, rows, columns) for the rows of a unit and for the remaining columns.
  template <typename F>
  void rows(const Unit& unit, const F& f) const {
    const int64_t whole = count(unit.block) / fold, rest = count(unit.block) % fold;
    if (whole) f(offset(unit), whole, width);
    if (rest) f(offset(unit) + whole * width, int64_t{1}, rest * g.channels);
  }

  // Writes the parameter of every column of a row.
  template <typename A>
  void expand(const A* values, A* columns) const {
    for (int64_t k = 0; k < fold; ++k) std::copy_n(values, g.channels, columns + k * g.channels);
  }

  // Adds up the columns of each channel.
  template <typename A>
  void reduce(const A* columns, A* sums) const {
    std::copy_n(columns, g.channels, sums);
    for (int64_t k = g.channels; k < width; k += g.channels) {
      for (int64_t c = 0; c < g.channels; ++c) sums[c] += columns[k + c];
    }
  }

  // Calls f(range of units) for all units in the order of memory, in parallel; each range is a callable that calls g(unit) for
  // its units.
  template <typename F>
  void parallel(const F& f) const {
    constexpr int64_t kGrainBytes = int64_t{32} << 10;
    const int64_t bytes = pixels * (last ? g.channels : 1) * static_cast<int64_t>(sizeof(T));
    at::parallel_for(0, all_blocks() * lines, std::max<int64_t>(1, kGrainBytes / bytes), [&](int64_t begin, int64_t end) {
      f([&](const auto& each) {
        for (int64_t u = begin; u < end; ++u) {
          const int64_t sample = u / (lines * blocks), block = u % blocks;
          each(Unit{sample, u / blocks % lines, block, sample * blocks + block});
        }
      });
    });
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

template <typename T>
void store(const Pack<T>& pack, T* to, int64_t tail) {
  tail ? pack.store(to, tail) : pack.store(to);
}

template <typename T>
Pack<T> broadcast(accumulate_t<T> value) {
  Pack<T> pack;
  std::fill(std::begin(pack.part), std::end(pack.part), typename Pack<T>::Part(value));
  return pack;
}

// Calls f(vector among those in registers, element, elements of a last, partial vector or 0) for a range of elements.
template <typename T, typename F>
void for_vectors(int64_t begin, int64_t count, const F& f) {
  constexpr int64_t kSize = Pack<T>::kSize;
  int64_t e = begin;
  const int64_t end = begin + count;
  for (; e + kWidth<T> <= end; e += kWidth<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns<T>; ++v) f(v, e + v * kSize, int64_t{0});
  }
  for (; e + kSize <= end; e += kSize) f(0, e, int64_t{0});
  if (e < end) f(0, e, end - e);
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

// Calls of_sample(sample)(offset in the sample, tail, packs) for every vector, in parallel; packs[k] holds parameters[k] of its
// channels.
template <typename T, size_t K, typename F>
void transform(const Lines<T>& lines, const std::array<const accumulate_t<T>*, K>& parameters, const F& of_sample) {
  using P = Pack<T>;
  using Unit = typename Lines<T>::Unit;
  lines.parallel([&](const auto& units) {
    if (!lines.last) {
      units([&](const Unit& unit) {
        std::array<P, K> packs;
        for (size_t k = 0; k < K; ++k) packs[k] = broadcast<T>(parameters[k][unit.line]);
        const auto f = of_sample(unit.sample);
        for_vectors<T>(lines.offset(unit), lines.count(unit.block), [&](int, int64_t e, int64_t tail) { f(e, tail, packs); });
      });
      return;
    }
    const int64_t padded = lines.padded();
    std::vector<accumulate_t<T>> columns(K * padded);
    for (size_t k = 0; k < K; ++k) lines.expand(parameters[k], columns.data() + k * padded);
    units([&](const Unit& unit) {
      const auto f = of_sample(unit.sample);
      lines.rows(unit, [&](int64_t offset, int64_t rows, int64_t width) {
        for_groups<T>(rows, width, [&](int64_t first, int64_t last) {
          for_columns<T>(width, [&](auto vectors, int64_t c, int64_t tail) {
            constexpr int V = decltype(vectors)::value;
            std::array<P, K> packs[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
#pragma GCC unroll 4
              for (size_t k = 0; k < K; ++k) {
                packs[v][k] = load_parameters<T>(columns.data() + k * padded + c + v * P::kSize, tail);
              }
            }
            for (int64_t r = first; r < last; ++r) {
#pragma GCC unroll 4
              for (int v = 0; v < V; ++v) f(offset + r * width + c + v * P::kSize, tail, packs[v]);
            }
          });
        });
      });
    });
  });
}

// A thread's memory for `add_up`.
template <typename T, int K>
struct Scratch {
  std::array<std::vector<accumulate_t<T>>, K> totals;
  std::vector<accumulate_t<T>> center;

  explicit Scratch(const Lines<T>& lines) : center(lines.padded()) {
    if (lines.last) totals.fill(center);
  }
};

// Writes K sums of a unit to sums[k][channel]. add(offset in the sample, tail, centers, sums) adds the terms of a vector; centers
// are those of its channels, zero past the tail.
template <typename T, int K, typename F>
void add_up(
    const Lines<T>& lines, const typename Lines<T>::Unit& unit, const accumulate_t<T>* center,
    const std::array<accumulate_t<T>*, K>& sums, Scratch<T, K>& scratch, const F& add) {
  using A = accumulate_t<T>;
  using P = Pack<T>;
  if (lines.last) {
    std::array<A*, K> totals;
    for (int k = 0; k < K; ++k) {
      std::fill(scratch.totals[k].begin(), scratch.totals[k].end(), A(0));
      totals[k] = scratch.totals[k].data();
    }
    lines.expand(center, scratch.center.data());
    lines.rows(unit, [&](int64_t offset, int64_t rows, int64_t width) {
      add_terms<T, K>(rows, width, totals, [&](int64_t e, int64_t c, int64_t tail, std::array<P, K>& to) {
        add(offset + e, tail, load_parameters<T>(scratch.center.data() + c, tail), to);
      });
    });
    for (int k = 0; k < K; ++k) lines.reduce(totals[k], sums[k]);
    return;
  }
  const A middle = center[unit.line];
  const P middles = broadcast<T>(middle);
  std::array<P, K> to[kColumns<T>];
  for (auto& each : to) each.fill(broadcast<T>(0));
  for_vectors<T>(lines.offset(unit), lines.count(unit.block), [&](int v, int64_t e, int64_t tail) {
    if (tail) std::fill(scratch.center.begin(), scratch.center.end(), middle);
    add(e, tail, tail ? load_parameters<T>(scratch.center.data(), tail) : middles, to[v]);
  });
  for (int k = 0; k < K; ++k) {
    auto sum = typename P::Part(0);
    for (const auto& each : to) {
      for (const auto& part : each[k].part) sum = sum + part;
    }
    A lanes[P::Part::size()];
    sum.store(lanes);
    sums[k][unit.line] = std::accumulate(std::begin(lanes), std::end(lanes), A(0));
  }
}

}  // namespace fastroute
