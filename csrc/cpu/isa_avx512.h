// Policies for AVX-512 with fp32 arithmetic: 16 lanes, weights widened to fp32 as they are loaded. Shared by
// isa_avx512.cpp and isa_avx512bf16.cpp.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own intrinsics, whose "undefined" operands are meant to be undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "kernel_body.h"

namespace t2::cpu {
namespace {

T2_INLINE __mmask16 first16(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

T2_INLINE __m512 widen(const float* p) { return _mm512_loadu_ps(p); }
T2_INLINE __m512 widen(const float* p, __mmask16 k) { return _mm512_maskz_loadu_ps(k, p); }
T2_INLINE __m512 bf16_to_ps(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
T2_INLINE __m512 widen(const BF16* p) {
  return bf16_to_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
T2_INLINE __m512 widen(const BF16* p, __mmask16 k) { return bf16_to_ps(_mm256_maskz_loadu_epi16(k, p)); }
T2_INLINE __m512 widen(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
T2_INLINE __m512 widen(const F16* p, __mmask16 k) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, p)); }
T2_INLINE __m512 widen(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
T2_INLINE __m512 widen(const std::int8_t* p, __mmask16 k) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(k, p)));
}

// As fp16 the bits say 2^-8 of the value, subnormals too.
T2_INLINE __m512 fp8_to_ps(__m128i v) {
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(v), 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
}
T2_INLINE __m512 widen(const F8* p) { return fp8_to_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
T2_INLINE __m512 widen(const F8* p, __mmask16 k) { return fp8_to_ps(_mm_maskz_loadu_epi8(k, p)); }

// Folds 16 lanes to 4 in a fixed tree: i with i + 8, then with i + 4.
T2_INLINE __m128 fold(__m512 a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

struct Sum512 {
  using Acc = __m512;
  static T2_INLINE Acc zero() { return _mm512_setzero_ps(); }
  static T2_INLINE void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
    const __m128 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(fa, fb), _mm_unpackhi_ps(fa, fb));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(fc, fd), _mm_unpackhi_ps(fc, fd));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
};

template <class WeightT, class XT>
struct Avx512 : Sum512 {
  using Weight = WeightT;
  using Act = float;
  using X = XT;
  using WReg = __m512;
  using AReg = __m512;
  static constexpr int kStep = 16;
  static constexpr int kTokens = 6;

  static T2_INLINE WReg load_w(const Weight* p) { return widen(p); }
  static T2_INLINE WReg load_w_tail(const Weight* p, int count) { return widen(p, first16(count)); }
  static T2_INLINE AReg load_a(const Act* p) { return widen(p); }
  static T2_INLINE AReg load_a_tail(const Act* p, int count) { return widen(p, first16(count)); }
  static T2_INLINE Acc fma(Acc acc, WReg w, AReg a) { return _mm512_fmadd_ps(w, a, acc); }
};

// fp16 is converted by the F16C instructions; the bit arithmetic of convert.h vectorises poorly.
void scale_row_f16(const void* in, void* out, const float* d, const float* scale, std::int64_t count) {
  const F16* a = static_cast<const F16*>(in);
  F16* b = static_cast<F16*>(out);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 k = count - i >= 16 ? static_cast<__mmask16>(0xffff) : first16(static_cast<int>(count - i));
    __m512 factor = widen(d + i, k);
    if (scale) factor = _mm512_mul_ps(factor, widen(scale + i, k));
    const __m512 v = _mm512_mul_ps(widen(a + i, k), factor);
    _mm256_mask_storeu_epi16(b + i, k, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}
void accumulate_f16(const void* gu, const void* h, float* sum, std::int64_t count) {
  const F16* a = static_cast<const F16*>(gu);
  const F16* b = static_cast<const F16*>(h);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 k = count - i >= 16 ? static_cast<__mmask16>(0xffff) : first16(static_cast<int>(count - i));
    const __m512 product = _mm512_mul_ps(widen(a + i, k), widen(b + i, k));
    _mm512_mask_storeu_ps(sum + i, k, _mm512_add_ps(widen(sum + i, k), product));
  }
}
template <class Q>
void dequantise_row_f16(const void* in, float row_scale, const float* col_scale, void* out, std::int64_t count) {
  const Q* q = static_cast<const Q*>(in);
  F16* b = static_cast<F16*>(out);
  for (std::int64_t i = 0; i < count; i += 16) {
    const __mmask16 k = count - i >= 16 ? static_cast<__mmask16>(0xffff) : first16(static_cast<int>(count - i));
    __m512 factor = _mm512_set1_ps(row_scale);
    if (col_scale) factor = _mm512_mul_ps(factor, widen(col_scale + i, k));
    const __m512 v = _mm512_mul_ps(widen(q + i, k), factor);
    _mm256_mask_storeu_epi16(b + i, k, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

constexpr RowKernels row_kernels_f16() {
  return RowKernels{scale_row_f16, accumulate_f16, dequantise_row_f16<std::int8_t>, dequantise_row_f16<F8>};
}

float read_stream(const void* data, std::int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m512i sum[8];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (std::int64_t i = 0; i + 512 <= bytes; i += 512)
    for (int j = 0; j < 8; ++j) sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(p + i + j * 64));
  for (int j = 1; j < 8; ++j) sum[0] = _mm512_xor_si512(sum[0], sum[j]);
  return static_cast<float>(_mm512_reduce_or_epi32(sum[0]));
}

}  // namespace
}  // namespace t2::cpu
