// int8 factors, weight-only: their per-column scales arrive as `scale`, beside d.
#include "decode.cuh"

template void t2::cuda::decode<float, std::int8_t>(const DecodeCall&);
template void t2::cuda::decode<__nv_bfloat16, std::int8_t>(const DecodeCall&);
template void t2::cuda::decode<__half, std::int8_t>(const DecodeCall&);
