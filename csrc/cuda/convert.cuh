// Element types and their way to fp32 and back. Everything is computed in fp32; these are for loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace t2::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(std::int8_t value) { return static_cast<float>(value); }

// fp8: one sign bit, four of the exponent, three of the mantissa; no infinity, and NaN is read as 480.
struct E4M3 {
  std::uint8_t bits;
};
__device__ __forceinline__ float to_float(E4M3 value) {
  // In the places of an fp32 it is the number times 2^-120, subnormal ones too.
  const std::uint32_t wide = (value.bits & 0x80u) << 24 | (value.bits & 0x7fu) << 20;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out * 0x1p120f;
}

// Round to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

}  // namespace t2::cuda
