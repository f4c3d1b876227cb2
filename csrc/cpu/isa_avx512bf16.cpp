// AVX-512 with the bf16 dot product: x and h*d stay bf16, 32 products per instruction, sums in fp32.
#include "kernel_table.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "isa_avx512.h"

namespace t2::cpu {
namespace {

T2_INLINE __mmask32 first32(int count) { return static_cast<__mmask32>((1ull << count) - 1ull); }

struct DotBF16 : Sum512 {
  using Weight = BF16;
  using Act = BF16;
  using X = BF16;
  using WReg = __m512bh;
  using AReg = __m512bh;
  static constexpr int kStep = 32;
  static constexpr int kTokens = 6;

  static T2_INLINE __m512bh load(const BF16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static T2_INLINE __m512bh load(const BF16* p, int count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(first32(count), p);
  }
  static T2_INLINE WReg load_w(const Weight* p) { return load(p); }
  static T2_INLINE WReg load_w_tail(const Weight* p, int count) { return load(p, count); }
  static T2_INLINE AReg load_a(const Act* p) { return load(p); }
  static T2_INLINE AReg load_a_tail(const Act* p, int count) { return load(p, count); }
  static T2_INLINE Acc fma(Acc acc, WReg w, AReg a) { return _mm512_dpbf16_ps(acc, w, a); }
};

// int8 weights become bf16 in registers, exactly: 8 bits of magnitude fit the mantissa. A table of 128 entries, in two
// registers for each byte of a bf16, is looked up by magnitude; the sign is added; the bytes are woven together.
struct TableBF16 {
  alignas(64) std::uint8_t low[128], high[128];
  constexpr TableBF16() : low{}, high{} {
    for (int v = 1; v < 128; ++v) {
      int exponent = 0;
      while (v >> (exponent + 1)) ++exponent;
      const int bits = (127 + exponent) << 7 | ((v << (7 - exponent)) & 0x7f);
      low[v] = static_cast<std::uint8_t>(bits & 0xff);
      high[v] = static_cast<std::uint8_t>(bits >> 8);
    }
  }
};
constexpr TableBF16 kTableBF16;

struct DotInt8 : Sum512 {
  using Weight = std::int8_t;
  using Act = BF16;
  using X = BF16;
  struct WReg {
    __m512bh first, second;
  };
  using AReg = WReg;
  static constexpr int kStep = 64;
  static constexpr int kTokens = 4;

  static T2_INLINE __mmask64 first64(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }
  static T2_INLINE WReg widen(__m512i v) {
    const __m512i low0 = _mm512_load_si512(kTableBF16.low), low1 = _mm512_load_si512(kTableBF16.low + 64);
    const __m512i high0 = _mm512_load_si512(kTableBF16.high), high1 = _mm512_load_si512(kTableBF16.high + 64);
    // Unpacking works within 128-bit lanes; this order of the 8-byte groups makes its results come out in order.
    v = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), v);
    const __m512i magnitude = _mm512_abs_epi8(v);
    const __m512i low = _mm512_permutex2var_epi8(low0, magnitude, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, magnitude, high1);
    // -128 has no magnitude of 7 bits: the table gives 0 for it. high of 128 is 0x43, and low 0 is right.
    high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), _mm512_set1_epi8(0x43));
    high = _mm512_ternarylogic_epi64(high, v, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);  // high | (v & 0x80)
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
  }
  static T2_INLINE WReg load_w(const Weight* p) { return widen(_mm512_loadu_si512(p)); }
  static T2_INLINE WReg load_w_tail(const Weight* p, int count) {
    return widen(_mm512_maskz_loadu_epi8(first64(count), p));
  }
  static T2_INLINE AReg load_a(const Act* p) { return {DotBF16::load(p), DotBF16::load(p + 32)}; }
  static T2_INLINE AReg load_a_tail(const Act* p, int count) {
    return {DotBF16::load_a_tail(p, count < 32 ? count : 32),
            DotBF16::load_a_tail(p + 32, count < 32 ? 0 : count - 32)};
  }
  static T2_INLINE Acc fma(Acc acc, const WReg& w, const AReg& a) {
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(acc, w.first, a.first), w.second, a.second);
  }
};

const KernelTable kTable = {
    "avx512bf16",
    {kernel<Avx512<float, float>>(), kernel<DotBF16>(), kernel<Avx512<F16, F16>>()},
    {kernel<Avx512<std::int8_t, float>>(), kernel<DotInt8>(), kernel<Avx512<std::int8_t, F16>>()},
    {row_kernels<float>(), row_kernels<BF16>(), {scale_row_f16, accumulate_f16, dequantise_row_f16}},
    read_stream,
};

}  // namespace

const KernelTable* avx512bf16_table() { return &kTable; }

}  // namespace t2::cpu
#else
namespace t2::cpu {
const KernelTable* avx512bf16_table() { return nullptr; }
}  // namespace t2::cpu
#endif
