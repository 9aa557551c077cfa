// A vector register's worth of T, held as vectors of the type in which sums accumulate.

#pragma once

#include "common.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <type_traits>

namespace fastroute {

template <typename T>
struct Pack {
  using Vector = at::vec::Vectorized<T>;
  using Part = at::vec::Vectorized<accumulate_t<T>>;
  static constexpr bool kReduced = sizeof(T) < sizeof(accumulate_t<T>);
  static constexpr int kParts = kReduced ? 2 : 1;
  static constexpr int64_t kSize = Vector::size();

  Part part[kParts];

  // With kRelu, of max(x, 0) for every x; NaN stays NaN.
  template <bool kRelu = false>
  static Pack of(const Vector& v) {
    Pack p;
    if constexpr (kReduced) {
      std::tie(p.part[0], p.part[1]) = at::vec::convert_to_float<T>(v);
    } else {
      p.part[0] = v;
    }
    if constexpr (kRelu) {
      for (Part& x : p.part) x = at::vec::clamp_min(x, Part(0));
    }
    return p;
  }
  template <bool kRelu = false>
  static Pack load(const T* from) {
    return of<kRelu>(Vector::loadu(from));
  }
  // Lanes past count are zero.
  template <bool kRelu = false>
  static Pack load(const T* from, int64_t count) {
    return of<kRelu>(Vector::loadu(from, count));
  }

  // Zero where x is not above zero.
  Pack where_positive(const Pack& x) const {
    Pack p;
    for (int h = 0; h < kParts; ++h) p.part[h] = part[h] & (x.part[h] > Part(0));
    return p;
  }

  Vector vector() const {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      return Vector(__builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(part[1], part[0])));
    }
#endif
    if constexpr (kReduced) {
      return at::vec::convert_from_float<T>(part[0], part[1]);
    } else {
      return part[0];
    }
  }
  void store(T* to) const { vector().store(to); }
  void store(T* to, int64_t count) const { vector().store(to, static_cast<int>(count)); }

  // Past the caches: a line that is written whole need not be read first. `to` is aligned to the register.
  void stream(T* to) const {
#if defined(CPU_CAPABILITY_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), __builtin_bit_cast(__m512i, vector()));
#elif defined(CPU_CAPABILITY_AVX2)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), __builtin_bit_cast(__m256i, vector()));
#else
    store(to);
#endif
  }
};

// Orders streamed stores before whatever tells another thread that they are done.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

template <typename V>
inline auto horizontal_sum(const V& v) {
  return at::vec::vec_reduce_all<typename V::value_type>([](const V& a, const V& b) { return a + b; }, v);
}

}  // namespace fastroute
