// The three passes of routing over a sample: pool, weighted sums, inner products. With kRelu, they apply max(x, 0) to every x
// that they read from a path.

#pragma once

#include "cpu/pack.h"
#include "paths.h"

#include <algorithm>
#include <array>
#include <utility>

namespace fastroute {

template <typename T>
using Pointers = std::array<T*, kMaxPaths>;

// Elements of every path per step of a pass: the working set of up to 8 paths fits in L2 with room to spare, and the fixed
// cost of a step is small in comparison.
constexpr int64_t kBlock = 4096;

// Groups of terms whose sums are added up in a row, before their sum is added to others.
constexpr int64_t kManyGroups = 64;

template <typename T>
struct Paths {
  int64_t count;
  Pointers<T> data{};
  std::array<int64_t, kMaxPaths> stride{};

  explicit Paths(at::TensorList xs) : count(static_cast<int64_t>(xs.size())) {
    for (int64_t i = 0; i < count; ++i) {
      data[i] = static_cast<T*>(const_cast<void*>(xs[i].const_data_ptr()));
      stride[i] = xs[i].stride(0);
    }
  }
  Pointers<T> sample(int64_t s) const {
    Pointers<T> at{};
    for (int64_t i = 0; i < count; ++i) at[i] = data[i] + s * stride[i];
    return at;
  }
};

template <typename T>
Pointers<T> advance(Pointers<T> at, int64_t count, int64_t offset) {
  for (int64_t i = 0; i < count; ++i) at[i] += offset;
  return at;
}

// Partial sums of a group of adjacent elements in the lanes of a vector; their sum is the total.
template <bool kRelu, typename T>
inline __attribute__((always_inline)) typename Pack<T>::Part sums_of_group(const T* x, int64_t count) {
  using P = Pack<T>;
  using F = Factor<T>;
  constexpr int kUnroll = 4;
  typename P::Part acc[kUnroll];
  for (auto& a : acc) a = typename P::Part(0);
  int64_t e = 0;
  for (; e + kUnroll * P::kSize <= count; e += kUnroll * P::kSize) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) acc[u] = F::add(F::template load<kRelu>(x + e + u * P::kSize), acc[u]);
  }
  for (; e + P::kSize <= count; e += P::kSize) acc[0] = F::add(F::template load<kRelu>(x + e), acc[0]);
  if (e < count) acc[1] = F::add(F::template load<kRelu>(x + e, count - e), acc[1]);
  return (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

// Elements of a group: 32 terms in each lane of each accumulator.
template <typename T>
constexpr int64_t kSumGroup = 128 * Pack<T>::kSize;

// The same of many elements. Sums of groups, and of 64 groups, are added up separately, so that rounding errors do not grow with
// the size of the map.
template <bool kRelu, typename T>
__attribute__((noinline)) typename Pack<T>::Part sums_of_groups(const T* x, int64_t count) {
  using Part = typename Pack<T>::Part;
  constexpr int64_t kGroup = kSumGroup<T>, kGroups = kManyGroups * kGroup;
  Part total(0);
  for (int64_t first = 0; first < count; first += kGroups) {
    const int64_t end = std::min(count, first + kGroups);
    Part sum(0);
    for (int64_t e = first; e < end; e += kGroup) {
      sum = sum + sums_of_group<kRelu>(x + e, std::min(kGroup, end - e));
    }
    total = total + sum;
  }
  return total;
}

template <bool kRelu, typename T>
inline __attribute__((always_inline)) typename Pack<T>::Part sums_in_lanes(const T* x, int64_t count) {
  return count <= kSumGroup<T> ? sums_of_group<kRelu>(x, count) : sums_of_groups<kRelu>(x, count);
}

template <bool kRelu, typename T>
accumulate_t<T> sum(const T* x, int64_t count) {
  return horizontal_sum(sums_in_lanes<kRelu>(x, count));
}

// Adjacent vectors that add_rows sums together: neighbouring cache lines are read together, and sums stay in registers.
template <typename T>
constexpr int kRowVectors = Pack<T>::Part::size() >= 16 ? 8 : 8 / Pack<T>::kParts;

// Rows that add_rows adds before it goes to the next columns: they fit in L1.
template <typename T>
int64_t group_of(int64_t width) {
  constexpr int64_t kGroupBytes = 16 << 10;
  return std::clamp<int64_t>(kGroupBytes / (width * static_cast<int64_t>(sizeof(T))), 8, 128);
}

// Sums over rows: total[c] += Σ_r x[r][c], r < rows. Rows are added in groups whose columns are processed in turn, so that
// memory is read in order. Rounding errors grow with the group size plus the number of groups, not with their product.
template <bool kRelu, typename T>
void add_rows(const T* x, int64_t rows, int64_t width, accumulate_t<T>* total) {
  using P = Pack<T>;
  const int64_t group = group_of<T>(width);
  for (int64_t begin = 0; begin < rows; begin += group) {
    const int64_t end = std::min(rows, begin + group);
    const auto columns = [&]<int V>(std::integral_constant<int, V>, int64_t c, int64_t tail) {
      P acc[V];
      for (auto& a : acc) std::fill(std::begin(a.part), std::end(a.part), typename P::Part(0));
      for (int64_t r = begin; r < end; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const T* from = x + r * width + c + v * P::kSize;
          const P p = tail ? P::template load<kRelu>(from, tail) : P::template load<kRelu>(from);
          for (int h = 0; h < P::kParts; ++h) acc[v].part[h] = acc[v].part[h] + p.part[h];
        }
      }
      for (int v = 0; v < V; ++v) {
        for (int h = 0; h < P::kParts; ++h) {
          constexpr int64_t kLanes = P::Part::size();
          accumulate_t<T>* to = total + c + v * P::kSize + h * kLanes;
          const int64_t count = tail ? std::clamp<int64_t>(tail - h * kLanes, 0, kLanes) : kLanes;
          if (count == kLanes) {
            (P::Part::loadu(to) + acc[v].part[h]).store(to);
          } else if (count > 0) {
            (P::Part::loadu(to, count) + acc[v].part[h]).store(to, static_cast<int>(count));
          }
        }
      }
    };
    constexpr int kVectors = kRowVectors<T>;
    int64_t c = 0;
    for (; c + kVectors * P::kSize <= width; c += kVectors * P::kSize) {
      columns(std::integral_constant<int, kVectors>(), c, 0);
    }
    for (; c + P::kSize <= width; c += P::kSize) columns(std::integral_constant<int, 1>(), c, 0);
    if (c < width) columns(std::integral_constant<int, 1>(), c, width - c);
  }
}

// The same for any number of rows: sums of 64 groups are added up separately, in `width` elements of scratch.
template <bool kRelu, typename T>
void add_many_rows(const T* x, int64_t rows, int64_t width, accumulate_t<T>* total, accumulate_t<T>* scratch) {
  const int64_t most = kManyGroups * group_of<T>(width);
  if (rows <= most) return add_rows<kRelu>(x, rows, width, total);
  for (int64_t r = 0; r < rows; r += most) {
    std::fill_n(scratch, width, accumulate_t<T>(0));
    add_rows<kRelu>(x + r * width, std::min(most, rows - r), width, scratch);
    for (int64_t c = 0; c < width; ++c) total[c] += scratch[c];
  }
}

// Number of pixels to which narrow rows of a channels_last sample are joined, so that vectors are full.
template <typename T>
int64_t fold_of(const Geometry& g) {
  constexpr int64_t kWidth = kRowVectors<T> * Pack<T>::kSize;
  return std::clamp<int64_t>(kWidth / g.channels, 1, g.size);
}

// Elements of scratch that `pool` needs.
template <typename T>
int64_t pool_scratch(const Geometry& g) {
  return g.channels_last ? 2 * fold_of<T>(g) * g.channels : 0;
}

// z[c] = mean over space of one sample (Eq. 3.3). scratch holds pool_scratch<T>(g) elements.
template <bool kRelu = false, typename T>
void pool(const T* x, const Geometry& g, accumulate_t<T>* z, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  const A size = static_cast<A>(g.size);
  if (!g.channels_last) {
    using Part = typename Pack<T>::Part;
    constexpr int64_t kLanes = Part::size();
    int64_t c = 0;
    for (; c + kLanes <= g.channels; c += kLanes) {
      Part sums[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) sums[k] = sums_in_lanes<kRelu>(x + (c + k) * g.size, g.size);
      (horizontal_sums(sums) / Part(size)).store(z + c);
    }
    for (; c < g.channels; ++c) z[c] = sum<kRelu>(x + c * g.size, g.size) / size;
    return;
  }
  const int64_t fold = fold_of<T>(g), width = fold * g.channels, rows = g.size / fold;
  std::fill_n(scratch, width, A(0));
  add_many_rows<kRelu>(x, rows, width, scratch, scratch + width);
  add_rows<kRelu>(x + rows * width, g.size - rows * fold, g.channels, scratch);
  for (int64_t c = 0; c < g.channels; ++c) {
    A total = 0;
    for (int64_t f = 0; f < fold; ++f) total += scratch[f * g.channels + c];
    z[c] = total / size;
  }
}

// Addend of output j at element e of row r: none, values[j * stride + r] or values[j * stride + e].
enum class Addend { kNone, kRow, kElement };

// The weighted sums of one sample.
template <typename T>
struct WeightedSums {
  using A = accumulate_t<T>;

  Pointers<const T> xs;
  Pointers<T> ys;
  int64_t n;
  std::array<std::array<A, kMaxPaths>, kMaxPaths> weights;  // [j][i] is the weight of input i in output j
  const A* addend;
  int64_t addend_stride;
  Pointers<const T> masks;
  // The next sample, to prefetch, so that reading it overlaps with writing this one.
  std::array<const T*, 2 * kMaxPaths> ahead;
  int64_t ahead_count = 0;

  // y_j = Σ_i weights[j][i] x_i + addend over `count` elements from `begin`, in rows of `length` (Eq. 3.7, 3.15). With kRelu,
  // the forward, which has no addend, applies the ReLU to x_i; the backward sets y_j to 0 unless masks_j > 0. For kElement the
  // elements are whole rows. For kRow a vector may extend into the next row, so that all vectors but the last are whole and
  // aligned for every row length.
  template <int M, Addend kAddend, bool kStream, bool kRelu>
  void run(int64_t begin, int64_t count, int64_t length) const {
    using P = Pack<T>;
    using Part = typename P::Part;
    constexpr bool kRectify = kRelu && kAddend == Addend::kNone, kMask = kRelu && kAddend != Addend::kNone;
    const auto step = [&](int64_t at, int64_t tail, const auto& added) __attribute__((always_inline)) {
      for (int64_t i = 0; i < ahead_count; ++i) __builtin_prefetch(ahead[i] + at, 0, 2);
      P x[M];
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        x[i] = tail ? P::template load<kRectify>(xs[i] + at, tail) : P::template load<kRectify>(xs[i] + at);
      }
      for (int64_t j = 0; j < n; ++j) {
        P y;
#pragma GCC unroll 2
        for (int h = 0; h < P::kParts; ++h) {
          const Part first = x[0].part[h], weight(weights[j][0]);
          if constexpr (kAddend == Addend::kNone) {
            y.part[h] = first * weight;
          } else {
            y.part[h] = at::vec::fmadd(first, weight, added(j, h * Part::size()));
          }
#pragma GCC unroll 8
          for (int i = 1; i < M; ++i) y.part[h] = at::vec::fmadd(x[i].part[h], Part(weights[j][i]), y.part[h]);
        }
        if constexpr (kMask) y = y.where_positive(tail ? P::load(masks[j] + at, tail) : P::load(masks[j] + at));
        if (tail) {
          y.store(ys[j] + at, tail);
        } else if constexpr (kStream) {
          y.stream(ys[j] + at);
        } else {
          y.store(ys[j] + at);
        }
      }
    };
    const int64_t end = begin + count;
    if constexpr (kAddend == Addend::kRow) {
      for (int64_t e = begin; e < end;) {
        const int64_t row = e / length, next = (row + 1) * length;
        const auto of_row = [&](int64_t j, int64_t) { return Part(addend[j * addend_stride + row]); };
        for (; e + P::kSize <= std::min(next, end); e += P::kSize) step(e, 0, of_row);
        if (e >= std::min(next, end)) continue;
        if (next >= end) {
          step(e, end - e, of_row);
          return;
        }
        const auto of_both = [&](int64_t j, int64_t lane) {
          const A* value = addend + j * addend_stride + row;
          return Part::set(Part(value[1]), Part(value[0]), std::clamp<int64_t>(next - e - lane, 0, Part::size()));
        };
        const int64_t tail = e + P::kSize <= end ? 0 : end - e;
        step(e, tail, of_both);
        e += tail ? tail : P::kSize;
      }
    } else {
      for (int64_t row = begin; row < end; row += length) {
        int64_t e = 0, tail = 0;
        const auto of_element = [&](int64_t j, int64_t lane) {
          const A* from = addend + j * addend_stride + e + lane;
          return tail ? Part::loadu(from, std::clamp<int64_t>(tail - lane, 0, Part::size())) : Part::loadu(from);
        };
        for (; e + P::kSize <= length; e += P::kSize) step(row + e, 0, of_element);
        tail = length - e;
        if (tail) step(row + e, tail, of_element);
      }
    }
  }

  using Run = void (WeightedSums::*)(int64_t, int64_t, int64_t) const;

  template <Addend kAddend, bool kRelu = false>
  static Run choose(int64_t m, bool stream) {
    return [&]<int... I>(std::integer_sequence<int, I...>) {
      static constexpr Run table[2][kMaxPaths] = {
          {&WeightedSums::run<I + 1, kAddend, false, kRelu>...}, {&WeightedSums::run<I + 1, kAddend, true, kRelu>...}};
      return table[stream][m - 1];
    }(std::make_integer_sequence<int, kMaxPaths>());
  }
};

// Inner products of M paths with N paths over `count` elements, added to total[i][j] (Eq. 3.10).
template <bool kRelu, typename T, int M, int N>
void inner_products_tile(
    const T* const* xs, const T* const* ys, int64_t count, std::array<double, kMaxPaths>* total, int64_t column) {
  using P = Pack<T>;
  using Part = typename P::Part;
  using F = Factor<T>;
  // Enough accumulators to hide the latency of a fused multiply-add, each with so few terms that rounding stays near that of
  // single products: gradients of the gate are sums of many products that cancel.
  constexpr int kUnroll = M * N >= 8 ? 1 : (M * N >= 4 ? 2 : 4);
  constexpr int64_t kGroup = 16 * kUnroll * P::kSize;
  Part sums[M][N];
  for (auto& row : sums) std::fill(std::begin(row), std::end(row), Part(0));
  for (int64_t e = 0; e < count; e += kGroup) {
    Part acc[M][N][kUnroll];
    for (auto& row : acc)
      for (auto& cell : row) std::fill(std::begin(cell), std::end(cell), Part(0));
    const auto step = [&](int64_t e, int u, int64_t tail) {
      F x[M];
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        x[i] = tail ? F::template load<kRelu>(xs[i] + e, tail) : F::template load<kRelu>(xs[i] + e);
      }
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const F y = tail ? F::template load<false>(ys[j] + e, tail) : F::template load<false>(ys[j] + e);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) acc[i][j][u] = F::multiply_add(x[i], y, acc[i][j][u]);
      }
    };
    const int64_t end = std::min(count, e + kGroup);
    int64_t at = e;
    for (; at + kUnroll * P::kSize <= end; at += kUnroll * P::kSize) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) step(at + u * P::kSize, u, 0);
    }
    for (; at + P::kSize <= end; at += P::kSize) step(at, 0, 0);
    if (at < end) step(at, 0, end - at);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) {
        Part sum = acc[i][j][0];
        for (int u = 1; u < kUnroll; ++u) sum = sum + acc[i][j][u];
        sums[i][j] = sums[i][j] + sum;
      }
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) total[i][column + j] += static_cast<double>(horizontal_sum(sums[i][j]));
  }
}

template <bool kRelu, typename T>
void inner_products(
    const Pointers<const T>& xs, int64_t m, const Pointers<const T>& ys, int64_t n, int64_t count,
    std::array<std::array<double, kMaxPaths>, kMaxPaths>& total) {
  constexpr int kTile = 4;
  using Run = void (*)(const T* const*, const T* const*, int64_t, std::array<double, kMaxPaths>*, int64_t);
  static constexpr auto table = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<Run, kTile * kTile>{&inner_products_tile<kRelu, T, I / kTile + 1, I % kTile + 1>...};
  }(std::make_integer_sequence<int, kTile * kTile>());
  for (int64_t i = 0; i < m; i += kTile) {
    for (int64_t j = 0; j < n; j += kTile) {
      const int64_t rows = std::min<int64_t>(kTile, m - i), columns = std::min<int64_t>(kTile, n - j);
      table[(rows - 1) * kTile + columns - 1](xs.data() + i, ys.data() + j, count, total.data() + i, j);
    }
  }
}

}  // namespace fastroute
