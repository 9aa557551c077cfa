// The passes around the convolutions of cross-prediction (Alg. 1), one block of pixels at a time. Convolutions take and return
// channels_last tensors, whose rows are pixels; paths that are [C, S] are transposed block by block in cache.

#include "cpu/route.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <iterator>
#include <limits>
#include <utility>

namespace fastroute {
namespace {

// The pixels of a block fill whole registers of any type.
constexpr int64_t kRowGroup = 32;

// to[c][r] = from[r][c] for 16 × 16 numbers.
template <typename T>
void transpose_tile(const T* from, int64_t from_pitch, T* to, int64_t to_pitch) {
#if defined(CPU_CAPABILITY_AVX512)
  // ATen's version takes sizes at run time, goes through memory, and took three times as long.
  if constexpr (std::is_same_v<T, float>) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_ps(from + r * from_pitch);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      b[r] = _mm512_unpacklo_ps(a[r], a[r + 1]);
      b[r + 1] = _mm512_unpackhi_ps(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
      a[r] = _mm512_shuffle_ps(b[r], b[r + 2], 0x44);
      a[r + 1] = _mm512_shuffle_ps(b[r], b[r + 2], 0xee);
      a[r + 2] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0x44);
      a[r + 3] = _mm512_shuffle_ps(b[r + 1], b[r + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // a[4 k + c] holds, in its quarter q, column 4 q + c of rows 4 k to 4 k + 3
      const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee);
      const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
      const __m512 high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
      _mm512_storeu_ps(to + c * to_pitch, _mm512_shuffle_f32x4(low, low2, 0x88));
      _mm512_storeu_ps(to + (4 + c) * to_pitch, _mm512_shuffle_f32x4(low, low2, 0xdd));
      _mm512_storeu_ps(to + (8 + c) * to_pitch, _mm512_shuffle_f32x4(high, high2, 0x88));
      _mm512_storeu_ps(to + (12 + c) * to_pitch, _mm512_shuffle_f32x4(high, high2, 0xdd));
    }
    return;
  }
#endif
  at::vec::transpose_mxn<T, 16, 16>(from, from_pitch, to, to_pitch);
}

// Transposes any sizes, tile by tile.
template <typename T>
void transpose(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, T* to, int64_t to_pitch) {
  constexpr int64_t kTile = 16;
  for (int64_t c = 0; c < columns; c += kTile) {
    for (int64_t r = 0; r < rows; r += kTile) {
      const T* source = from + r * from_pitch + c;
      T* target = to + c * to_pitch + r;
      const int64_t height = std::min(kTile, rows - r), width = std::min(kTile, columns - c);
      if (height == kTile && width == kTile) {
        transpose_tile(source, from_pitch, target, to_pitch);
      } else {
        at::vec::transpose_mxn<T>(
            source, from_pitch, target, to_pitch, static_cast<int>(height), static_cast<int>(width));
      }
    }
  }
}

// Terms that are added up in a row, before their sum is added to others: blocks of few channels have thousands of rows.
constexpr int64_t kTermsInARow = 32;

// Pixels of a block: few enough for the second read of a block to come from cache, in whole tiles.
int64_t rows_of(const Geometry& g) {
  return std::min(g.size, std::max<int64_t>(kRowGroup, kBlock / g.channels / kRowGroup * kRowGroup));
}

// A block of pixels of a path as rows of `channels` elements, `pitch` apart: in place, or transposed to `tile`.
template <typename T>
struct Rows {
  T* data;
  int64_t pitch;
};

template <typename T>
Rows<const T> read_rows(const T* sample, const Geometry& g, int64_t row, int64_t rows, T* tile) {
  if (g.channels_last) return {sample + row * g.channels, g.channels};
  transpose(sample + row, g.size, g.channels, rows, tile, g.channels);
  return {tile, g.channels};
}

template <typename T>
Rows<T> rows_to_write(T* sample, const Geometry& g, int64_t row, T* tile) {
  return {g.channels_last ? sample + row * g.channels : tile, g.channels};
}

// Copies rows that were written to a tile to their destination; `tile` is another tile.
template <typename T>
void written(const Rows<T>& from, T* sample, const Geometry& g, int64_t row, int64_t rows, bool stream, T* tile) {
  if (g.channels_last) return;
  if (!stream) {
    transpose(from.data, from.pitch, rows, g.channels, sample + row, g.size);
    return;
  }
  transpose(from.data, from.pitch, rows, g.channels, tile, rows);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t r = 0; r < rows; r += Pack<T>::kSize) {
      Pack<T>::load(tile + c * rows + r).stream(sample + c * g.size + row + r);
    }
  }
}

template <typename T>
struct Blocks {
  const Geometry& g;
  int64_t rows;
  std::vector<T> memory;

  Blocks(const Geometry& geometry, int64_t tiles)
      : g(geometry), rows(rows_of(geometry)), memory(g.channels_last ? 0 : tiles * rows * g.channels) {}
  T* tile(int64_t k) { return g.channels_last ? nullptr : memory.data() + k * rows * g.channels; }

  template <typename F>
  void each(const F& f) const {
    for (int64_t row = 0; row < g.size; row += rows) f(row, std::min(rows, g.size - row));
  }
};

// `kParts` vectors of T in the accumulation type. Half a register of a half-precision type serves rows of that length, at half
// the cost of a masked register.
template <typename T, int kParts>
struct Lanes {
  using Part = typename Pack<T>::Part;
  using Vector = at::vec::Vectorized<T>;
  static constexpr int64_t kSize = kParts * Part::size();
  static constexpr bool kHalf = kParts < Pack<T>::kParts;

  Part part[kParts];

  static Lanes all(accumulate_t<T> value) {
    Lanes lanes;
    for (auto& part : lanes.part) part = Part(value);
    return lanes;
  }
  static Lanes load(const T* from, int64_t tail) {
    Lanes lanes;
    if constexpr (kHalf) {
      if constexpr (std::is_same_v<T, at::BFloat16>) {
        at::vec::load_fp32_from_bf16(from, lanes.part[0]);
      } else {
        at::vec::load_fp32_from_fp16(from, lanes.part[0]);
      }
    } else {
      const auto pack = tail ? Pack<T>::load(from, tail) : Pack<T>::load(from);
      for (int h = 0; h < kParts; ++h) lanes.part[h] = pack.part[h];
    }
    return lanes;
  }
  void store(T* to, int64_t tail, bool stream = false) const {
    Pack<T> pack;
    for (int h = 0; h < Pack<T>::kParts; ++h) pack.part[h] = part[h % kParts];
    if (kHalf || tail) {
      pack.store(to, kHalf ? kSize : tail);
    } else if (stream) {
      pack.stream(to);
    } else {
      pack.store(to);
    }
  }
  static Lanes load_sums(const accumulate_t<T>* from, int64_t tail) {
    Lanes lanes;
    for (int h = 0; h < kParts; ++h) {
      const int64_t count = tail ? std::clamp<int64_t>(tail - h * Part::size(), 0, Part::size()) : Part::size();
      lanes.part[h] = count == Part::size() ? Part::loadu(from + h * count) : Part::loadu(from + h * Part::size(), count);
    }
    return lanes;
  }
  void store_sums(accumulate_t<T>* to, int64_t tail) const {
    for (int h = 0; h < kParts; ++h) {
      const int64_t count = tail ? std::clamp<int64_t>(tail - h * Part::size(), 0, Part::size()) : Part::size();
      part[h].store(to + h * Part::size(), static_cast<int>(count));
    }
  }
  friend Lanes fmadd(const Lanes& a, const Part& b, Lanes c) {
    for (int h = 0; h < kParts; ++h) c.part[h] = at::vec::fmadd(a.part[h], b, c.part[h]);
    return c;
  }
};

// Calls f(Lanes, offset, tail) for each register of a row; tail is 0 except for a last, partial register.
template <typename T, typename F>
void for_registers(int64_t channels, const F& f) {
  using Full = Lanes<T, Pack<T>::kParts>;
  using Half = Lanes<T, 1>;
  int64_t c = 0;
  for (; c + Full::kSize <= channels; c += Full::kSize) f(Full(), c, 0);
  if (Half::kHalf && c + Half::kSize <= channels) {
    f(Half(), c, 0);
    c += Half::kSize;
  }
  if (c < channels) f(Full(), c, channels - c);
}

// Returns whether outputs use non-temporal stores: they are large, and every row is aligned to registers.
template <typename T>
bool streams(const Paths<T>& paths, const Geometry& g) {
  return (g.channels_last ? g.channels : g.size) % Pack<T>::kSize == 0 && streamable(paths, g);
}

// Calls f(integral_constant<int, count>()) for count from 0 to 8.
template <typename F>
void with_count(int64_t count, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((count == I ? (f(std::integral_constant<int, I>()), true) : false) || ...);
  }(std::make_integer_sequence<int, kMaxPaths + 1>());
}

void check_joined(at::TensorList joined, const at::Tensor& like, int64_t parts) {
  TORCH_CHECK(!joined.empty() && static_cast<int64_t>(joined.size()) <= kMaxPaths, "1 to 8 paths are served");
  for (const auto& x : joined) {
    TORCH_CHECK(
        x.dim() == like.dim() && x.size(0) == like.size(0) && x.size(1) == parts * like.size(1) &&
            x.sizes().slice(2) == like.sizes().slice(2) && x.scalar_type() == like.scalar_type() &&
            x.device() == like.device() && (x.size(0) == 0 || sample_is_dense(x, true)),
        "joined paths must be channels_last and have ", parts, " times the channels");
  }
}

at::Tensor checked(const OptionalTensor& t, at::IntArrayRef shape, const at::Tensor& x) {
  return parameter(t, accumulate_type(x.scalar_type()), shape, x);
}

// out_j = ReLU(Σ_i gates[i][j] predictions_i[part j] + offsets[j]), without ReLU where not `relu` (Eq. 3.6).
void sum_predictions(
    at::TensorList predictions, const at::Tensor& gates_, const OptionalTensor& offsets_, bool relu,
    at::TensorList outputs) {
  const at::Tensor& y0 = aligned_path(outputs);
  const Geometry g(y0);
  const int64_t m = static_cast<int64_t>(predictions.size()), n = static_cast<int64_t>(outputs.size());
  check_joined(predictions, y0, n);
  const at::Tensor gates = checked(gates_, {g.batch, m, n}, y0), offsets = checked(offsets_, {g.batch, n, g.channels}, y0);
  dispatch(y0.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<const T> us(predictions);
    const Paths<T> ys(outputs);
    const int64_t pitch = n * g.channels;
    const bool stream = streams(ys, g);
    for_samples(g, (m + 1) * n, sizeof(T), [&](int64_t begin, int64_t end) {
      Blocks<T> blocks(g, 2);
      const std::vector<A> zeros(offsets.defined() ? 0 : pitch);
      for (int64_t s = begin; s < end; ++s) {
        const auto u = us.sample(s);
        const auto y = ys.sample(s);
        const A* weights = data<A>(gates) + s * m * n;
        const A* offset = offsets.defined() ? data<A>(offsets) + s * pitch : zeros.data();
        const A floor = relu ? A(0) : -std::numeric_limits<A>::infinity();
        blocks.each([&](int64_t row, int64_t rows) {
          for (int64_t j = 0; j < n; ++j) {
            const Rows<T> to = rows_to_write(y[j], g, row, blocks.tile(0));
            with_count(m, [&](auto count) {
              for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (row + r) * pitch + j * g.channels;
                for_registers<T>(g.channels, [&]<typename L>(L, int64_t c, int64_t tail) {
                  L sum = L::load_sums(offset + j * g.channels + c, tail);
#pragma GCC unroll 8
                  for (int i = 0; i < count(); ++i) {
                    sum = fmadd(L::load(u[i] + at + c, tail), typename L::Part(weights[i * n + j]), sum);
                  }
                  for (auto& part : sum.part) part = at::vec::clamp_min(part, typename L::Part(floor));
                  sum.store(to.data + r * to.pitch + c, tail, stream && g.channels_last);
                });
              }
            });
            written(to, y[j], g, row, rows, stream, blocks.tile(1));
          }
        });
      }
      stream_fence();
    });
  });
}

// masked_p = paths_p where masks_p > 0, or paths_p itself without masks; scaled_q[part p] = weights[p][q] masked_p.
// `masked` may be empty; both are channels_last. Returns the sums of masked over space (N, P, C) if `sums`. Its outputs stay in
// cache, since a convolution reads them next.
at::Tensor scale_paths(
    at::TensorList paths, at::TensorList masks, const at::Tensor& weights_, bool sums, at::TensorList masked,
    at::TensorList scaled) {
  const at::Tensor& x = aligned_path(paths);
  const Geometry g(x);
  const int64_t parts = static_cast<int64_t>(paths.size()), count = weights_.size(-1);
  TORCH_CHECK(count <= kMaxPaths, "up to 8 outputs are served, not ", count);
  const at::Tensor weights = checked(weights_, {g.batch, parts, count}, x);
  if (!masks.empty()) check_aligned(masks, x);
  TORCH_CHECK(masks.empty() || static_cast<int64_t>(masks.size()) == parts, "as many masks as paths are needed");
  if (!masked.empty()) check_joined(masked, x, 1);
  TORCH_CHECK(masked.empty() || static_cast<int64_t>(masked.size()) == parts, "as many masked paths as paths are needed");
  TORCH_CHECK(static_cast<int64_t>(scaled.size()) == count, "one joined path for each weight is needed");
  if (!scaled.empty()) check_joined(scaled, x, parts);
  at::Tensor totals = at::empty({g.batch, parts, g.channels}, weights.options());
  dispatch(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<const T> xs(paths), ms(masks);
    const Paths<T> to_masked(masked), to_scaled(scaled);
    const int64_t pitch = parts * g.channels;
    for_samples(g, (count + 2) * parts, sizeof(T), [&](int64_t begin, int64_t end) {
      Blocks<T> blocks(g, 2);
      std::vector<A> some(parts * g.channels);  // sums over kManyGroups blocks
      for (int64_t s = begin; s < end; ++s) {
        const auto sample = xs.sample(s), mask = ms.sample(s);
        const auto kept = to_masked.sample(s);
        A* all = totals.mutable_data_ptr<A>() + s * parts * g.channels;
        std::fill_n(all, parts * g.channels, A(0));
        const auto add_up = [&] {
          for (int64_t c = 0; c < std::ssize(some); ++c) all[c] += std::exchange(some[c], A(0));
        };
        blocks.each([&](int64_t row, int64_t rows) {
          if (row % (kManyGroups * blocks.rows) == 0) add_up();
          for (int64_t p = 0; p < parts; ++p) {
            const A* weight = data<A>(weights) + (s * parts + p) * count;
            const auto from = read_rows(sample[p], g, row, rows, blocks.tile(0));
            const auto masking = masks.empty() ? Rows<const T>{} : read_rows(mask[p], g, row, rows, blocks.tile(1));
            const auto to = advance(to_scaled.sample(s), count, row * pitch + p * g.channels);
            with_count(count, [&](auto outs) {
              for_registers<T>(g.channels, [&]<typename L>(L, int64_t c, int64_t tail) {
                L total = L::all(0), sum;
                const auto add = [](L& to, const L& from) {
                  for (int h = 0; h < std::ssize(to.part); ++h) to.part[h] = to.part[h] + from.part[h];
                };
                for (int64_t first = 0; first < rows; first += kTermsInARow) {
                  sum = L::all(0);
                  const int64_t end = std::min(rows, first + kTermsInARow);
                  for (int64_t r = first; r < end; ++r) {
                    L x = L::load(from.data + r * from.pitch + c, tail);
                    if (masking.data) {
                      const L y = L::load(masking.data + r * masking.pitch + c, tail);
                      for (int h = 0; h < std::ssize(x.part); ++h) {
                        using Part = typename L::Part;
                        x.part[h] = Part::blendv(x.part[h], Part(0), y.part[h] <= Part(0));  // keeps NaN
                      }
                    }
                    if (kept[p]) x.store(kept[p] + (row + r) * g.channels + c, tail);
                    add(sum, x);
#pragma GCC unroll 8
                    for (int q = 0; q < outs(); ++q) {
                      fmadd(x, typename L::Part(weight[q]), L::all(0)).store(to[q] + r * pitch + c, tail);
                    }
                  }
                  add(total, sum);
                }
                sum = L::load_sums(some.data() + p * g.channels + c, tail);
                add(total, sum);
                total.store_sums(some.data() + p * g.channels + c, tail);
              });
            });
          }
        });
        add_up();
      }
    });
  });
  return sums ? totals : at::empty({0, parts, g.channels}, weights.options());
}

// products[i][j] = <terms_j[part i], x_i> over each sample (Eq. 3.10) and, unless there are none,
// grad_xs_i = Σ_j gates[i][j] terms_j[part i], whose format need not be that of xs.
at::Tensor sum_gradients(at::TensorList terms, at::TensorList xs, const at::Tensor& gates_, at::TensorList grad_xs) {
  const at::Tensor& x0 = aligned_path(xs);
  const Geometry g(x0);
  const int64_t m = static_cast<int64_t>(xs.size()), n = static_cast<int64_t>(terms.size());
  check_joined(terms, x0, m);
  if (!grad_xs.empty()) aligned_path(grad_xs);
  TORCH_CHECK(
      grad_xs.empty() || (static_cast<int64_t>(grad_xs.size()) == m && grad_xs[0].sizes() == x0.sizes() &&
                          grad_xs[0].scalar_type() == x0.scalar_type()),
      "as many gradients as paths, of their shape and type, are needed");
  const Geometry to_g = grad_xs.empty() ? g : Geometry(grad_xs[0]);
  const at::Tensor gates = checked(gates_, {g.batch, m, n}, x0);
  at::Tensor products = at::empty({g.batch, m, n}, gates.options());
  dispatch(x0.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Paths<const T> ts(terms), paths(xs);
    const Paths<T> to(grad_xs);
    const int64_t pitch = m * g.channels;
    const int64_t row_terms = (g.channels + Pack<T>::Part::size() - 1) / Pack<T>::Part::size();  // in each lane
    const int64_t group_rows = std::max<int64_t>(1, kTermsInARow / row_terms);
    const bool stream = streams(to, to_g);
    for_samples(g, (n + 2) * m, sizeof(T), [&](int64_t begin, int64_t end) {
      Blocks<T> blocks(g.channels_last ? to_g : g, 3);
      for (int64_t s = begin; s < end; ++s) {
        const auto t = ts.sample(s), x = paths.sample(s);
        const auto dx = to.sample(s);
        const A* weights = data<A>(gates) + s * m * n;
        double total[kMaxPaths][kMaxPaths] = {};
        blocks.each([&](int64_t row, int64_t rows) {
          for (int64_t i = 0; i < m; ++i) {
            const auto from = read_rows(x[i], g, row, rows, blocks.tile(0));
            const bool mixes = dx[i] != nullptr;
            const auto sum = mixes ? rows_to_write(dx[i], to_g, row, blocks.tile(1)) : Rows<T>{};
            with_count(n, [&](auto count) {
              using Part = typename Pack<T>::Part;
              Part dot[count()], group[count()];
              std::fill_n(dot, count(), Part(0));
              for (int64_t first = 0; first < rows; first += group_rows) {
                std::fill_n(group, count(), Part(0));
                const int64_t end = std::min(rows, first + group_rows);
                for (int64_t r = first; r < end; ++r) {
                  const int64_t at = (row + r) * pitch + i * g.channels;
                  for_registers<T>(g.channels, [&]<typename L>(L, int64_t c, int64_t tail) {
                    const L p = L::load(from.data + r * from.pitch + c, tail);
                    L d = L::all(0);
#pragma GCC unroll 8
                    for (int j = 0; j < count(); ++j) {
                      const L term = L::load(t[j] + at + c, tail);
                      d = fmadd(term, typename L::Part(weights[i * n + j]), d);
                      for (int h = 0; h < std::ssize(d.part); ++h) {
                        group[j] = at::vec::fmadd(term.part[h], p.part[h], group[j]);
                      }
                    }
                    if (mixes) d.store(sum.data + r * sum.pitch + c, tail, stream && to_g.channels_last);
                  });
                }
                for (int j = 0; j < count(); ++j) dot[j] = dot[j] + group[j];
              }
              for (int j = 0; j < count(); ++j) total[i][j] += static_cast<double>(horizontal_sum(dot[j]));
            });
            if (mixes) written(sum, dx[i], to_g, row, rows, stream, blocks.tile(2));
          }
        });
        A* out = products.mutable_data_ptr<A>() + s * m * n;
        for (int64_t k = 0; k < m * n; ++k) out[k] = static_cast<A>(total[k / n][k % n]);
      }
      stream_fence();
    });
  });
  return products;
}

}  // namespace
}  // namespace fastroute

TORCH_LIBRARY_IMPL(fastroute_native, CPU, m) {
  m.impl("sum_predictions", &fastroute::sum_predictions);
  m.impl("scale_paths", &fastroute::scale_paths);
  m.impl("sum_gradients", &fastroute::sum_gradients);
}
