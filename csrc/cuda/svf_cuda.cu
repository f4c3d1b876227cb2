// From addresses and type codes to typed launches.
#include "svf_cuda.h"

#include "decode.cuh"

namespace t2::cuda {
namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("svf_decode: ") + message);
}

}  // namespace

std::string runtime_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

void svf_decode(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                Address work, std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m, int x_dtype, int w_dtype,
                int device, Address stream) {
  require(T >= 0 && n > 0 && r > 0 && m > 0, "expected T >= 0 and n, r, m > 0");
  require(w_dtype == x_dtype || w_dtype == kI8, "expected w_dtype equal to x_dtype, or int8");
  if (T == 0) return;
  require(x && U && V && y && work && d, "x, U, V, d, y and work must be given");
  const DeviceGuard guard(device);
  const DecodeCall call{pointer<void>(x),       pointer<void>(U),           pointer<void>(V),
                        pointer<float>(d),      pointer<float>(base),       pointer<float>(scale),
                        pointer<std::int32_t>(slot), pointer<void>(bias),   pointer<void>(y),
                        pointer<void>(h),       pointer<float>(work),       x_stride,
                        d_stride,               slots,                      T,
                        n,                      r,                          m,
                        pointer<std::remove_pointer_t<cudaStream_t>>(stream)};
  const bool int8 = w_dtype == kI8;
  switch (x_dtype) {
    case kF32:
      return int8 ? decode<float, std::int8_t>(call) : decode<float, float>(call);
    case kBF16:
      return int8 ? decode<__nv_bfloat16, std::int8_t>(call) : decode<__nv_bfloat16, __nv_bfloat16>(call);
    case kF16:
      return int8 ? decode<__half, std::int8_t>(call) : decode<__half, __half>(call);
    default:
      throw std::invalid_argument("svf_decode: x_dtype must be fp32 (0), bf16 (1) or fp16 (2), got " +
                                  std::to_string(x_dtype));
  }
}

}  // namespace t2::cuda
