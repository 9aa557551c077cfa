// The gate of one sample: two dense layers and a softmax (Eq. 3.4, 3.5) or one (Eq. 3.9), and their backward.

#pragma once

#include "cpu/pack.h"

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
    // W vectors side by side, each summed in kSums / W interleaved parts.
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

  // pooled (m, C) -> h (m, G), scores (m, n), gates (m, n); w1_transposed is (m, C, G), or null for few samples, for
  // which to transpose it does not pay
  void forward(const A* pooled, const A* w1_transposed, A* h, A* scores, A* gates) const {
    const int64_t width = hidden ? hidden : channels;
    for (int64_t i = 0; i < m; ++i) {
      const A* z = pooled + i * channels;
      A* layer = h + i * hidden;
      if (w1_transposed) {
        weighted_rows(z, w1_transposed + i * channels * hidden, channels, hidden, layer);
      } else {
        for (int64_t k = 0; k < hidden; ++k) layer[k] = dot(w1 + (i * hidden + k) * channels, z, channels);
      }
      for (int64_t k = 0; k < hidden; ++k) {
        if (b1) layer[k] += b1[i * hidden + k];
        if (layer[k] <= 0) layer[k] = 0;  // a NaN stays one
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

}  // namespace fastroute
