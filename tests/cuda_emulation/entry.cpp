// The launcher of csrc/cuda with a C interface for ctypes. Returns 0, or 1 with the message in `error_text`.
#include <cstdio>
#include <exception>

#include "svf_cuda.h"

using t2::cuda::Address;
using I64 = std::int64_t;

extern "C" int emulated_svf_decode(Address x, I64 x_stride, Address U, Address V, Address d, I64 d_stride, I64 slots,
                                   Address slot, Address base, Address bias, Address scale, Address y, Address h,
                                   Address work, I64 T, I64 n, I64 r, I64 m, I64 x_dtype, I64 w_dtype, I64 device,
                                   Address stream, char* error_text, I64 error_size) {
  try {
    t2::cuda::svf_decode(x, x_stride, U, V, d, d_stride, slots, slot, base, bias, scale, y, h, work, T, n, r, m,
                         static_cast<int>(x_dtype), static_cast<int>(w_dtype), static_cast<int>(device), stream);
    return 0;
  } catch (const std::exception& problem) {
    std::snprintf(error_text, static_cast<std::size_t>(error_size), "%s", problem.what());
    return 1;
  }
}
