#include "decode.cuh"

template void t2::cuda::decode<float, float>(const DecodeCall&);
