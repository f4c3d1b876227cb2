#include "decode.cuh"

template void t2::cuda::decode<__half, __half>(const DecodeCall&);
