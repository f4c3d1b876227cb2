// Which kernels are compiled: one translation unit per line of each list, so that they compile in parallel.
#pragma once

#include "call.cuh"

namespace t2::cuda {

// decode.cuh: plain multiply-adds, any alignment.
template <typename Element, typename Weight>
void decode(const DecodeCall& call);
extern template void decode<float, float>(const DecodeCall&);
extern template void decode<__nv_bfloat16, __nv_bfloat16>(const DecodeCall&);
extern template void decode<__half, __half>(const DecodeCall&);
extern template void decode<float, std::int8_t>(const DecodeCall&);
extern template void decode<__nv_bfloat16, std::int8_t>(const DecodeCall&);
extern template void decode<__half, std::int8_t>(const DecodeCall&);
extern template void decode<float, E4M3>(const DecodeCall&);
extern template void decode<__nv_bfloat16, E4M3>(const DecodeCall&);
extern template void decode<__half, E4M3>(const DecodeCall&);

// launch_mma.cuh: tensor cores. Not for fp16 with 8-bit factors: (x V) * d * scale may leave fp16's range.
template <typename Element, typename Weight>
void decode_mma(const DecodeCall& call);
extern template void decode_mma<__nv_bfloat16, __nv_bfloat16>(const DecodeCall&);
extern template void decode_mma<__half, __half>(const DecodeCall&);
extern template void decode_mma<__nv_bfloat16, std::int8_t>(const DecodeCall&);
extern template void decode_mma<__nv_bfloat16, E4M3>(const DecodeCall&);

}  // namespace t2::cuda
