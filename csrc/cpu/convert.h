// bf16, fp16 and fp8 (e4m3fn) to fp32 and back from it, one element at a time, without any instruction-set assumption.
// Everything has internal linkage: these headers are compiled with different flags in different files, and the
// linker must never pick an AVX-512 copy of a function for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

namespace t2::cpu {
namespace {

struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
struct F8 {
  std::uint8_t bits;
};

inline float as_float(std::uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline std::uint32_t as_bits(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(BF16 v) { return as_float(static_cast<std::uint32_t>(v.bits) << 16); }
inline float to_float(std::int8_t v) { return static_cast<float>(v); }
inline float to_float(F16 v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(v.bits & 0x7fffu);
  // Shifted into fp32's fields the exponent is 112 too small; a multiplication by 2^112 mends it, subnormals too.
  const float scaled = as_float(magnitude << 13) * as_float(0x77800000u);
  // Infinity and NaN keep an all-ones exponent.
  const float value = magnitude >= 0x7c00u ? as_float((magnitude << 13) | 0x7f800000u) : scaled;
  return as_float(as_bits(value) | sign);
}

inline float to_float(F8 v) {
  const std::uint32_t sign = static_cast<std::uint32_t>(v.bits & 0x80u) << 24;
  const std::uint32_t magnitude = v.bits & 0x7fu;
  // In fp32's fields the exponent is 120 too small. A subnormal, M * 2^-9, is (1 + M/8) * 2^-6 without the 1: no fp32
  // subnormal on the way, which a processor may be told to flush. The one NaN is kept.
  const float normal = as_float((magnitude << 20) + 0x3c000000u);
  const float small = as_float((magnitude << 20) + 0x3c800000u) - 0x1p-6f;
  const float value = magnitude < 8u ? small : normal;
  return as_float((magnitude == 0x7fu ? 0x7fc00000u : as_bits(value)) | sign);
}

template <class To>
To from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline BF16 from_float<BF16>(float v) {
  const std::uint32_t bits = as_bits(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BF16{0x7fc0u};
  // Round to nearest, ties to even.
  return BF16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline F16 from_float<F16>(float v) {
  const std::uint32_t bits = as_bits(v);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return F16{static_cast<std::uint16_t>(sign | 0x7e00u)};
  // 65520 is half-way from the largest fp16 to the next step: it and all above become infinity.
  if (magnitude >= 0x477ff000u) return F16{static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 lets the fp32 adder round to fp16's subnormal step 2^-24.
    const float rounded = as_float(magnitude) + 0.5f;
    return F16{static_cast<std::uint16_t>(sign | (as_bits(rounded) - 0x3f000000u))};
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return F16{static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
}

}  // namespace
}  // namespace t2::cpu
