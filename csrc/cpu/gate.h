// The gate of one sample: two dense layers and a softmax (Eq. 3.4, 3.5) or one (Eq. 3.9), and their backward.

#pragma once

#include "cpu/pack.h"
#include "cpu/route.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

namespace fastroute {

template <typename A>
A dot(const A* a, const A* b, int64_t count) {
  using V = at::vec::Vectorized<A>;
  V acc[2] = {V(0), V(0)};
  int64_t e = 0;
  for (; e + 2 * V::size() <= count; e += 2 * V::size()) {
    acc[0] = at::vec::fmadd(V::loadu(a + e), V::loadu(b + e), acc[0]);
    acc[1] = at::vec::fmadd(V::loadu(a + e + V::size()), V::loadu(b + e + V::size()), acc[1]);
  }
  for (; e < count; e += V::size()) {
    const int64_t lanes = std::min<int64_t>(V::size(), count - e);
    acc[0] = at::vec::fmadd(V::loadu(a + e, lanes), V::loadu(b + e, lanes), acc[0]);
  }
  return horizontal_sum(acc[0] + acc[1]);
}

// y[c] = Σ_r a[r] x[r][c] over rows x (R, C); several sums are in flight at once, and none needs a horizontal sum.
template <typename A>
void weighted_rows(const A* a, const A* x, int64_t rows, int64_t columns, A* y) {
  using V = at::vec::Vectorized<A>;
  constexpr int kSums = 4;
  const auto block = [&]<int W>(std::integral_constant<int, W>, int64_t c, int64_t tail) {
    // W adjacent vectors, each summed in kSums / W interleaved parts.
    V acc[kSums];
    for (auto& sum : acc) sum = V(0);
    const auto add = [&](int64_t r, int part) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const A* from = x + r * columns + c + w * V::size();
        acc[part * W + w] = at::vec::fmadd(V(a[r]), tail ? V::loadu(from, tail) : V::loadu(from), acc[part * W + w]);
      }
    };
    int64_t r = 0;
    for (; r + kSums / W <= rows; r += kSums / W) {
#pragma GCC unroll 4
      for (int part = 0; part < kSums / W; ++part) add(r + part, part);
    }
    for (; r < rows; ++r) add(r, 0);
    for (int w = 0; w < W; ++w) {
      V sum = acc[w];
      for (int part = 1; part < kSums / W; ++part) sum = sum + acc[part * W + w];
      if (tail) {
        sum.store(y + c, static_cast<int>(tail));
      } else {
        sum.store(y + c + w * V::size());
      }
    }
  };
  int64_t c = 0;
  for (; c + kSums * V::size() <= columns; c += kSums * V::size()) block(std::integral_constant<int, kSums>(), c, 0);
  for (; c + V::size() <= columns; c += V::size()) block(std::integral_constant<int, 1>(), c, 0);
  if (c < columns) block(std::integral_constant<int, 1>(), c, columns - c);
}

// w (m, R, C) -> (m, C, R)
template <typename A>
std::vector<A> transposed(const A* w, int64_t m, int64_t rows, int64_t columns) {
  std::vector<A> t(m * rows * columns);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) t[(i * columns + c) * rows + r] = w[(i * rows + r) * columns + c];
    }
  }
  return t;
}

template <typename A>
struct Gate {
  int64_t m, n, channels, hidden;  // hidden is 0 for the linear gate
  const A *w1, *b1, *w2, *b2;      // (m, G, C), (m, G), (m, n, G), (m, n); absent ones null

  // w1 as (m, C, G), or nothing if there are too few samples to amortise the transposition.
  std::vector<A> w1_for(int64_t batch) const {
    constexpr int64_t kTransposeFrom = 8;
    return batch >= kTransposeFrom ? transposed(w1, m, hidden, channels) : std::vector<A>();
  }

  // pooled (m, C) -> h (m, G), scores (m, n), gates (m, n); w1_transposed is from w1_for
  void forward(const A* pooled, const std::vector<A>& w1_transposed, A* h, A* scores, A* gates) const {
    const int64_t width = hidden ? hidden : channels;
    for (int64_t i = 0; i < m; ++i) {
      const A* z = pooled + i * channels;
      A* layer = h + i * hidden;
      if (!w1_transposed.empty()) {
        weighted_rows(z, w1_transposed.data() + i * channels * hidden, channels, hidden, layer);
      } else {
        for (int64_t k = 0; k < hidden; ++k) layer[k] = dot(w1 + (i * hidden + k) * channels, z, channels);
      }
      for (int64_t k = 0; k < hidden; ++k) {
        if (b1) layer[k] += b1[i * hidden + k];
        if (layer[k] <= 0) layer[k] = 0;  // keeps NaN
      }
      const A* input = hidden ? layer : z;
      A* a = scores + i * n;
      for (int64_t j = 0; j < n; ++j) a[j] = dot(w2 + (i * n + j) * width, input, width) + (b2 ? b2[i * n + j] : A(0));
      const A top = *std::max_element(a, a + n);
      A total = 0;
      for (int64_t j = 0; j < n; ++j) total += gates[i * n + j] = std::exp(a[j] - top);
      for (int64_t j = 0; j < n; ++j) gates[i * n + j] /= total;
    }
  }

  // d_gates (m, n) -> d_scores (m, n), d_h (m, G), and d_pooled (m, C) divided by `size`
  void backward(
      const A* d_gates, const A* grad_scores, const A* gates, const A* h, A size, A* d_scores, A* d_h,
      A* d_pooled) const {
    for (int64_t i = 0; i < m; ++i) {
      const A *g = gates + i * n, *dg = d_gates + i * n;
      A* da = d_scores + i * n;
      A inner = 0;
      for (int64_t j = 0; j < n; ++j) inner += g[j] * dg[j];
      for (int64_t j = 0; j < n; ++j) {
        da[j] = g[j] * (dg[j] - inner) + (grad_scores ? grad_scores[i * n + j] : A(0));  // Eq. 3.12, 3.13
      }
      A* dz = d_pooled + i * channels;
      if (hidden) {
        A* dh = d_h + i * hidden;
        weighted_rows(da, w2 + i * n * hidden, n, hidden, dh);
        for (int64_t k = 0; k < hidden; ++k) {
          if (!(h[i * hidden + k] > 0)) dh[k] = 0;
        }
        weighted_rows(dh, w1 + i * hidden * channels, hidden, channels, dz);
      } else {
        weighted_rows(da, w2 + i * n * channels, n, channels, dz);
      }
      for (int64_t c = 0; c < channels; ++c) dz[c] /= size;
    }
  }
};

template <typename A>
Gate<A> gate_of(const Parameters& p) {
  return {p.m, p.n, p.channels, p.hidden, data<A>(p.w1), data<A>(p.b1), data<A>(p.w2), data<A>(p.b2)};
}

// out[i][r][c] = Σ_s a[s][i][r] b[s][i][c] and sum[i][r] = Σ_s a[s][i][r], samples in order (Eq. 3.14).
template <typename A>
void outer_sums(
    const A* a, const A* b, int64_t batch, int64_t m, int64_t rows, int64_t columns, A* out, A* sum) {
  using V = at::vec::Vectorized<A>;
  constexpr int64_t kGroup = 128;  // rounding errors grow with the group size and the number of groups
  constexpr int kVectors = 4;
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, batch * columns));
  at::parallel_for(0, m * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / rows;
      const A* a_row = a + row;
      const A* b_row = b + i * columns;
      double total = 0;
      for (int64_t s = 0; s < batch; ++s) total += static_cast<double>(a_row[s * m * rows]);
      sum[row] = static_cast<A>(total);
      A* to = out + row * columns;
      std::fill_n(to, columns, A(0));
      for (int64_t c = 0; c < columns; c += kVectors * V::size()) {
        for (int64_t first = 0; first < batch; first += kGroup) {
          V acc[kVectors] = {V(0), V(0), V(0), V(0)};
          const auto lanes = [&](int v) {
            return std::clamp<int64_t>(columns - c - v * V::size(), 0, V::size());
          };
          for (int64_t s = first; s < std::min(batch, first + kGroup); ++s) {
            const V scale(a_row[s * m * rows]);
            const A* from = b_row + s * m * columns + c;
            for (int v = 0; v < kVectors && lanes(v) > 0; ++v) {
              acc[v] = at::vec::fmadd(scale, V::loadu(from + v * V::size(), lanes(v)), acc[v]);
            }
          }
          for (int v = 0; v < kVectors && lanes(v) > 0; ++v) {
            A* at = to + c + v * V::size();
            (V::loadu(at, lanes(v)) + acc[v]).store(at, static_cast<int>(lanes(v)));
          }
        }
      }
    }
  });
}

// The gradients of a gate's parameters.
struct ParameterGradients {
  const Parameters& p;
  at::Tensor w1, b1, w2, b2;

  explicit ParameterGradients(const Parameters& parameters) : p(parameters) {
    const auto options = p.w2.options();
    w1 = p.hidden ? at::empty_like(p.w1) : at::empty({0}, options);
    b1 = p.hidden ? at::empty({p.m, p.hidden}, options) : at::empty({0}, options);
    w2 = at::empty_like(p.w2);
    b2 = at::empty({p.m, p.n}, options);
  }

  // From d_scores (N, m, n), d_hidden (N, m, G), pooled (N, m, C) and hidden (N, m, G), all contiguous.
  template <typename A>
  void compute(const at::Tensor& d_scores, const at::Tensor& d_hidden, const at::Tensor& pooled, const at::Tensor& hidden) {
    const int64_t batch = pooled.size(0), width = p.hidden ? p.hidden : p.channels;
    outer_sums(
        data<A>(d_scores), data<A>(p.hidden ? hidden : pooled), batch, p.m, p.n, width, w2.mutable_data_ptr<A>(),
        b2.mutable_data_ptr<A>());
    if (p.hidden) {
      outer_sums(
          data<A>(d_hidden), data<A>(pooled), batch, p.m, p.hidden, p.channels, w1.mutable_data_ptr<A>(),
          b1.mutable_data_ptr<A>());
    }
  }
};

}  // namespace fastroute
