// AVX-512 without bf16 instructions: 16-bit and 8-bit weights are widened to fp32 in registers.
#include "kernel_table.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "isa_avx512.h"

namespace t2::cpu {
namespace {

const KernelTable kTable = {
    "avx512",
    {kernel<Avx512<float, float>>(), kernel<Avx512<BF16, BF16>>(), kernel<Avx512<F16, F16>>()},
    {kernel<Avx512<std::int8_t, float>>(), kernel<Avx512<std::int8_t, BF16>>(), kernel<Avx512<std::int8_t, F16>>()},
    {kernel<Avx512<F8, float>>(), kernel<Avx512<F8, BF16>>(), kernel<Avx512<F8, F16>>()},
    {row_kernels<float>(), row_kernels<BF16>(), row_kernels_f16()},
    read_stream,
};

}  // namespace

const KernelTable* avx512_table() { return &kTable; }

}  // namespace t2::cpu
#else
namespace t2::cpu {
const KernelTable* avx512_table() { return nullptr; }
}  // namespace t2::cpu
#endif
