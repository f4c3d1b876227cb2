// Stands in for CUDA's header of this name.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const std::uint32_t wide = static_cast<std::uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof(out));
  return out;
}

// Round to nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  std::uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  if (value != value) return {static_cast<std::uint16_t>((wide >> 16) | 0x40)};
  return {static_cast<std::uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
