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

const KernelTable kTable = {
    "avx512bf16",
    {kernel<Avx512<float, float>>(), kernel<DotBF16>(), kernel<Avx512<F16, F16>>()},
    {kernel<Avx512<std::int8_t, float>>(), kernel<Avx512<std::int8_t, BF16>>(), kernel<Avx512<std::int8_t, F16>>()},
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
