#include "decode.cuh"

template void t2::cuda::decode<__nv_bfloat16, __nv_bfloat16>(const DecodeCall&);
