// One vector register of T, held as vectors of the accumulation type.

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

  // With kRelu, max(x, 0) of every x; keeps NaN.
  template <bool kRelu = false>
  static Pack of(const Vector& v) {
    Pack p;
    if constexpr (kReduced) {
      std::tie(p.part[0], p.part[1]) = at::vec::convert_to_float<T>(v);
    } else {
      p.part[0] = v;
    }
    if constexpr (kRelu) p.rectify();
    return p;
  }
  void rectify() {
    for (Part& x : part) x = at::vec::clamp_min(x, Part(0));
  }
  template <bool kRelu = false>
  static Pack load(const T* from) {
    if constexpr (kReduced) {
      // Half a register at a time is converted while loading.
      Pack p;
      for (int h = 0; h < kParts; ++h) {
        if constexpr (std::is_same_v<T, at::BFloat16>) {
          at::vec::load_fp32_from_bf16(from + h * Part::size(), p.part[h]);
        } else {
          at::vec::load_fp32_from_fp16(from + h * Part::size(), p.part[h]);
        }
      }
      if constexpr (kRelu) p.rectify();
      return p;
    } else {
      return of<kRelu>(Vector::loadu(from));
    }
  }
  // Lanes past count are zero.
  template <bool kRelu = false>
  static Pack load(const T* from, int64_t count) {
    return of<kRelu>(Vector::loadu(from, count));
  }

  // Zero unless x > 0.
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

  // Non-temporal store: a cache line that is written whole need not be read first. `to` is aligned to the register.
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

// A vector of one path for sums and inner products: unconverted if one instruction multiplies and adds its type, else
// converted.
template <typename T>
struct Factor {
  using P = Pack<T>;
  using Part = typename P::Part;

  P pack;

  template <bool kRelu>
  static Factor load(const T* from) {
    return {P::template load<kRelu>(from)};
  }
  template <bool kRelu>
  static Factor load(const T* from, int64_t count) {
    return {P::template load<kRelu>(from, count)};
  }
  // Per lane, acc + Σ x · y over the elements of the lane.
  static Part multiply_add(const Factor& x, const Factor& y, Part acc) {
    for (int h = 0; h < P::kParts; ++h) acc = at::vec::fmadd(x.pack.part[h], y.pack.part[h], acc);
    return acc;
  }
  static Part add(const Factor& x, Part acc) {
    for (int h = 0; h < P::kParts; ++h) acc = acc + x.pack.part[h];
    return acc;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Factor<at::BFloat16> {
  using P = Pack<at::BFloat16>;
  using Part = P::Part;

  __m512i bits;

  template <bool kRelu>
  static Factor load(const at::BFloat16* from) {
    return of<kRelu>(_mm512_loadu_si512(from));
  }
  template <bool kRelu>
  static Factor load(const at::BFloat16* from, int64_t count) {
    return of<kRelu>(_mm512_maskz_loadu_epi16((uint32_t{1} << count) - 1, from));
  }
  static Part multiply_add(const Factor& x, const Factor& y, Part acc) {
    return Part(_mm512_dpbf16_ps(acc, __builtin_bit_cast(__m512bh, x.bits), __builtin_bit_cast(__m512bh, y.bits)));
  }
  static Part add(const Factor& x, Part acc) { return multiply_add(x, {_mm512_set1_epi16(0x3f80)}, acc); }

 private:
  template <bool kRelu>
  static Factor of(__m512i bits) {
    if constexpr (kRelu) {
      // Values from -0 to -∞ are 0x8000 to 0xff80; above are negative NaNs, which are kept.
      const __m512i above = _mm512_sub_epi16(bits, _mm512_set1_epi16(-0x8000));
      bits = _mm512_maskz_mov_epi16(_mm512_cmpgt_epu16_mask(above, _mm512_set1_epi16(0x7f80)), bits);
    }
    return {bits};
  }
};
#endif

// Orders non-temporal stores before any signal to another thread that they are done.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

template <typename V>
inline auto horizontal_sum(const V& v) {
  return at::vec::vec_reduce_all<typename V::value_type>([](const V& a, const V& b) { return a + b; }, v);
}

// Sums each of as many vectors as one has lanes, into the lanes of one vector; the vectors are overwritten. Repeatedly adds
// neighbours and joins the remaining halves of two vectors, for a third of the work of one horizontal sum each.
template <typename V>
V horizontal_sums(V* vectors) {
#pragma GCC unroll 4
  for (int count = V::size(); count > 1; count /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < count / 2; ++k) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * k], vectors[2 * k + 1]);
      vectors[k] = even + odd;
    }
  }
  return vectors[0];
}

}  // namespace fastroute
