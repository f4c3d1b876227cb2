#include "launch_mma.cuh"

template void t2::cuda::decode_mma<__half, __half>(const DecodeCall&);
