// The gate of one sample: two dense layers and a softmax (Eq. 3.4, 3.5) or one (Eq. 3.9), and their backward.

#pragma once

#include "cpu/pack.h"

#include <algorithm>
#include <cmath>

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

// y += a · x
template <typename A>
void axpy(A a, const A* x, A* y, int64_t count) {
  using V = at::vec::Vectorized<A>;
  int64_t e = 0;
  for (; e + V::size() <= count; e += V::size()) at::vec::fmadd(V(a), V::loadu(x + e), V::loadu(y + e)).store(y + e);
  for (; e < count; ++e) y[e] += a * x[e];
}

template <typename A>
struct Gate {
  int64_t m, n, channels, hidden;  // hidden is 0 for the linear gate
  const A *w1, *b1, *w2, *b2;      // (m, G, C), (m, G), (m, n, G), (m, n); absent ones null

  // pooled (m, C) -> h (m, G), scores (m, n), gates (m, n)
  void forward(const A* pooled, A* h, A* scores, A* gates) const {
    const int64_t width = hidden ? hidden : channels;
    for (int64_t i = 0; i < m; ++i) {
      const A* z = pooled + i * channels;
      for (int64_t g = 0; g < hidden; ++g) {
        const int64_t row = i * hidden + g;
        const A value = dot(w1 + row * channels, z, channels) + (b1 ? b1[row] : A(0));
        h[row] = value <= 0 ? A(0) : value;  // a NaN stays one
      }
      const A* input = hidden ? h + i * hidden : z;
      A* a = scores + i * n;
      for (int64_t j = 0; j < n; ++j) a[j] = dot(w2 + (i * n + j) * width, input, width) + (b2 ? b2[i * n + j] : A(0));
      const A top = *std::max_element(a, a + n);
      A total = 0;
      for (int64_t j = 0; j < n; ++j) total += gates[i * n + j] = std::exp(a[j] - top);
      for (int64_t j = 0; j < n; ++j) gates[i * n + j] /= total;
    }
  }

  // d_gates (m, n) -> d_scores (m, n), d_h (m, G), d_pooled (m, C), the last divided by `size`
  void backward(
      const A* d_gates, const A* grad_scores, const A* gates, const A* h, A size, A* d_scores, A* d_h,
      A* d_pooled) const {
    for (int64_t i = 0; i < m; ++i) {
      const A *g = gates + i * n, *dg = d_gates + i * n;
      A* da = d_scores + i * n;
      A* dz = d_pooled + i * channels;
      A inner = 0;
      for (int64_t j = 0; j < n; ++j) inner += g[j] * dg[j];
      for (int64_t j = 0; j < n; ++j) {
        da[j] = g[j] * (dg[j] - inner) + (grad_scores ? grad_scores[i * n + j] : A(0));  // Eq. 3.12, 3.13
      }
      std::fill_n(dz, channels, A(0));
      if (!hidden) {
        for (int64_t j = 0; j < n; ++j) axpy(da[j] / size, w2 + (i * n + j) * channels, dz, channels);
        continue;
      }
      A* dh = d_h + i * hidden;
      std::fill_n(dh, hidden, A(0));
      for (int64_t j = 0; j < n; ++j) axpy(da[j], w2 + (i * n + j) * hidden, dh, hidden);
      for (int64_t k = 0; k < hidden; ++k) {
        if (!(h[i * hidden + k] > 0)) dh[k] = 0;
        axpy(dh[k] / size, w1 + (i * hidden + k) * channels, dz, channels);
      }
    }
  }
};

}  // namespace fastroute
