// CUDA kernels of t2kernels: the public C++ surface, included by csrc/bindings.cpp. Needs no CUDA header.
//
//     y = ((x V) * d_row) U^T + bias        d_row(t) = D[slot[t]], or `base` where slot[t] = -1
//
// Addresses are plain integers (tensor.data_ptr()), 0 = absent; all name memory of `device`. Strides count
// elements. The calls only enqueue work on `stream`: they allocate nothing, wait for nothing and may be captured
// in a CUDA graph. Wrong codes or sizes throw std::invalid_argument; a refused launch throws std::runtime_error.
#pragma once

#include <cstdint>
#include <string>

namespace t2::cuda {

using Address = std::uintptr_t;

// Type codes, shared with Python and with csrc/cpu/svf_cpu.h.
enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3 };

// CUDA runtime linked into this module, e.g. "13.0".
std::string runtime_version();

// Two launches: work = (x V) * d_row * scale, then y = work U^T + bias. Meant for decode sizes (T <= 128): every 8
// tokens read the factors once, the repeats from L2.
//   x (T, n) x_dtype, row stride x_stride; V stored (r, n), U (m, r), both contiguous in w_dtype (== x_dtype, or kI8)
//   d fp32: (r,) when slot = 0, else (slots, r) with row stride d_stride; slot (T,) int32; base (r,) fp32, used where
//   slot = -1 (0: zeros); bias (m,) x_dtype or 0; scale (r,) fp32 or 0, multiplied beside d
//   y (T, m) contiguous x_dtype; h (T, r) contiguous x_dtype or 0: the unscaled x V; work (T, r) fp32
// Accumulates in fp32 and keeps (x V) * d in fp32: the only roundings to x_dtype are those of y and h. The bits of a
// row depend on this row and the factors alone, not on T, the other rows or the alignment. A slot outside
// [-1, slots) gives a row of NaN: another request's expert is never read by mistake.
void svf_decode(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                Address work, std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m, int x_dtype, int w_dtype,
                int device, Address stream);

}  // namespace t2::cuda
