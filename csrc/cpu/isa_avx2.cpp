// AVX2 with FMA and F16C: 8 lanes, all weights widened to fp32 in registers.
#include "kernel_table.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "kernel_body.h"

namespace t2::cpu {
namespace {

T2_INLINE __m256 widen(const float* p) { return _mm256_loadu_ps(p); }
T2_INLINE __m256 widen(const BF16* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
T2_INLINE __m256 widen(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
T2_INLINE __m256 widen(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// As fp16 the bits say 2^-8 of the value, subnormals too.
T2_INLINE __m256 widen(const F8* p) {
  const __m128i v = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(v, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
}
// The last elements of a row go through a zeroed buffer: nothing behind the row is read.
template <class T>
T2_INLINE __m256 widen_tail(const T* p, int count) {
  T buffer[8] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return widen(buffer);
}

T2_INLINE __m128 fold(__m256 a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }

template <class WeightT, class XT>
struct Avx2 {
  using Weight = WeightT;
  using Act = float;
  using X = XT;
  using Acc = __m256;
  using WReg = __m256;
  using AReg = __m256;
  static constexpr int kStep = 8;
  // 8 sums, 4 weights and one activation fit the 16 registers.
  static constexpr int kTokens = 2;

  static T2_INLINE Acc zero() { return _mm256_setzero_ps(); }
  static T2_INLINE WReg load_w(const Weight* p) { return widen(p); }
  static T2_INLINE WReg load_w_tail(const Weight* p, int count) { return widen_tail(p, count); }
  static T2_INLINE AReg load_a(const Act* p) { return widen(p); }
  static T2_INLINE AReg load_a_tail(const Act* p, int count) { return widen_tail(p, count); }
  static T2_INLINE Acc fma(Acc acc, WReg w, AReg a) { return _mm256_fmadd_ps(w, a, acc); }
  static T2_INLINE void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
    const __m128 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(fa, fb), _mm_unpackhi_ps(fa, fb));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(fc, fd), _mm_unpackhi_ps(fc, fd));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
  }
};

float read_stream(const void* data, std::int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m256i sum[8];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (std::int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 8; ++j)
      sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + j * 32)));
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
  return static_cast<float>(_mm256_extract_epi32(sum[0], 0));
}

const KernelTable kTable = {
    "avx2",
    {kernel<Avx2<float, float>>(), kernel<Avx2<BF16, BF16>>(), kernel<Avx2<F16, F16>>()},
    {kernel<Avx2<std::int8_t, float>>(), kernel<Avx2<std::int8_t, BF16>>(), kernel<Avx2<std::int8_t, F16>>()},
    {kernel<Avx2<F8, float>>(), kernel<Avx2<F8, BF16>>(), kernel<Avx2<F8, F16>>()},
    {row_kernels<float>(), row_kernels<BF16>(), row_kernels<F16>()},
    read_stream,
};

}  // namespace

const KernelTable* avx2_table() { return &kTable; }

}  // namespace t2::cpu
#else
namespace t2::cpu {
const KernelTable* avx2_table() { return nullptr; }
}  // namespace t2::cpu
#endif
