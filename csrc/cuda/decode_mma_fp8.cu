#include "launch_mma.cuh"

template void t2::cuda::decode_mma<__nv_bfloat16, t2::cuda::E4M3>(const DecodeCall&);
