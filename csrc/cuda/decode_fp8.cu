// fp8 factors, weight-only: their per-column scales arrive as `scale`, beside d.
#include "decode.cuh"

template void t2::cuda::decode<float, t2::cuda::E4M3>(const DecodeCall&);
template void t2::cuda::decode<__nv_bfloat16, t2::cuda::E4M3>(const DecodeCall&);
template void t2::cuda::decode<__half, t2::cuda::E4M3>(const DecodeCall&);
