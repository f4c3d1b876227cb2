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

// 8-bit weights become bf16 in registers, exactly: their magnitude fits the mantissa. A table of 128 entries, in two
// registers for each byte of a bf16, is looked up by magnitude; the sign is added; the bytes are woven together.
struct TableBF16 {
  alignas(64) std::uint8_t low[128], high[128];
  constexpr void set(int at, int bits) {
    low[at] = static_cast<std::uint8_t>(bits & 0xff);
    high[at] = static_cast<std::uint8_t>(bits >> 8);
  }
  // 1 <= v < 128 as a bf16 times 2^power.
  static constexpr int bits_of(int v, int power) {
    int exponent = 0;
    while (v >> (exponent + 1)) ++exponent;
    return (127 + exponent + power) << 7 | ((v << (7 - exponent)) & 0x7f);
  }
};
constexpr TableBF16 int8_table() {
  TableBF16 table{};
  for (int v = 1; v < 128; ++v) table.set(v, TableBF16::bits_of(v, 0));
  return table;
}
constexpr TableBF16 fp8_table() {
  TableBF16 table{};
  for (int v = 1; v < 8; ++v) table.set(v, TableBF16::bits_of(v, -9));
  for (int v = 8; v < 127; ++v) table.set(v, (v << 4) + (120 << 7));
  table.set(127, 0x7fc0);  // NaN
  return table;
}
constexpr TableBF16 kInt8Table = int8_table(), kFp8Table = fp8_table();

T2_INLINE __m512i look_up(const std::uint8_t* table, __m512i at) {
  return _mm512_permutex2var_epi8(_mm512_load_si512(table), at, _mm512_load_si512(table + 64));
}
// high | (v & 0x80)
T2_INLINE __m512i with_sign(__m512i high, __m512i v) {
  return _mm512_ternarylogic_epi64(high, v, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
}

// The two bytes of the bf16 values of 64 weights.
struct Bytes {
  __m512i low, high;
};
T2_INLINE Bytes widen(const std::int8_t*, __m512i v) {
  const __m512i magnitude = _mm512_abs_epi8(v);
  // -128 has no magnitude of 7 bits: the table gives 0 for it. high of 128 is 0x43, and low 0 is right.
  const __m512i high = _mm512_mask_mov_epi8(look_up(kInt8Table.high, magnitude), _mm512_movepi8_mask(magnitude),
                                            _mm512_set1_epi8(0x43));
  return {look_up(kInt8Table.low, magnitude), with_sign(high, v)};
}
T2_INLINE Bytes widen(const F8*, __m512i v) {  // the look-up ignores the sign bit
  return {look_up(kFp8Table.low, v), with_sign(look_up(kFp8Table.high, v), v)};
}

template <class WeightT>
struct DotBytes : Sum512 {
  using Weight = WeightT;
  using Act = BF16;
  using X = BF16;
  struct WReg {
    __m512bh first, second;
  };
  using AReg = WReg;
  static constexpr int kStep = 64;
  static constexpr int kTokens = 4;

  static T2_INLINE __mmask64 first64(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }
  static T2_INLINE WReg weave(__m512i v) {
    // Unpacking works within 128-bit lanes; this order of the 8-byte groups makes its results come out in order.
    const Bytes b = widen(static_cast<const Weight*>(nullptr),
                          _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), v));
    return {(__m512bh)_mm512_unpacklo_epi8(b.low, b.high), (__m512bh)_mm512_unpackhi_epi8(b.low, b.high)};
  }
  static T2_INLINE WReg load_w(const Weight* p) { return weave(_mm512_loadu_si512(p)); }
  static T2_INLINE WReg load_w_tail(const Weight* p, int count) {
    return weave(_mm512_maskz_loadu_epi8(first64(count), p));
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
    {kernel<Avx512<std::int8_t, float>>(), kernel<DotBytes<std::int8_t>>(), kernel<Avx512<std::int8_t, F16>>()},
    {kernel<Avx512<F8, float>>(), kernel<DotBytes<F8>>(), kernel<Avx512<F8, F16>>()},
    {row_kernels<float>(), row_kernels<BF16>(), row_kernels_f16()},
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
