#include "launch_mma.cuh"

template void t2::cuda::decode_mma<__nv_bfloat16, __nv_bfloat16>(const DecodeCall&);
