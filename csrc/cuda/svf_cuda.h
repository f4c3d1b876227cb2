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
#include <vector>

namespace t2::cuda {

using Address = std::uintptr_t;

// Type codes, shared with Python and with csrc/cpu/svf_cpu.h.
enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kF8 = 4 };  // kF8: e4m3fn, read as finite

// How svf_decode computes; all forms take the same arguments.
//   kFma             two launches, fp32 multiply-adds, any alignment; keeps (x V) * d in fp32
//   kMma             two launches, tensor cores; rounds (x V) * d * scale once, to x_dtype
//   kMmaPdl          the same, the second launch starts early, fetches its first tiles of U and waits for the first
//                    one (programmatic dependent launch; sm_90 and later, elsewhere it is kMma)
//   kMmaCooperative  the same in one cooperative launch with a barrier between the products
// The tensor-core forms give the same bits as each other. They want bf16 or fp16 x with factors of its dtype, or bf16
// x with 8-bit factors; n and r multiples of 8 (16 with 8 bits); x, its row stride, U, V and work on 16 bytes.
enum Form : int { kFma = 0, kMma = 1, kMmaPdl = 2, kMmaCooperative = 3 };

// How much one block of a tensor-core form computes at a time, rows of the factor x tokens. kByTokens lets T decide.
// The tile changes the speed, never a bit.
enum TileCode : int { kByTokens = 0, k16x8, k32x8, k64x8, k32x32, k64x32, k32x64, k48x64, kTileCodes };

// CUDA runtime linked into this module, e.g. "13.0".
std::string runtime_version();

// Of each capture of a CUDA graph its own number, the one that is under way on `stream`; 0 for none.
std::uint64_t capture(int device, Address stream);

// work = (x V) * d_row * scale, then y = work U^T + bias. Meant for decode sizes (T <= 128): the factors are read once
// per 8 tokens (kFma) or per 8 to 64 (tensor cores), the repeats from L2.
//   x (T, n) x_dtype, row stride x_stride; V stored (r, n), U (m, r), both contiguous in w_dtype: x_dtype, kI8, kF8
//   d fp32: (r,) when slot = 0, else (slots, r) with row stride d_stride; slot (T,) int32; base (r,) fp32, used where
//   slot = -1 (0: zeros); bias (m,) x_dtype or 0; scale (r,) fp32 or 0, multiplied beside d
//   y (T, m) contiguous x_dtype; h (T, r) contiguous x_dtype or 0: the unscaled x V
//   work (T, r): fp32, or x_dtype in the tensor-core forms; need not be initialised
//   barrier: two 32-bit counters for kMmaCooperative, else 0. Zero before the first launch that gets them; every
//   launch leaves them zero. Launches that may run at the same time must not share them.
// Accumulates in fp32. The bits of a row depend on this row, the factors and the form (kFma or tensor cores) alone,
// not on T, the other rows or the alignment. A slot outside [-1, slots) gives a row of NaN: another request's expert
// is never read by mistake.
void svf_decode(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                Address work, Address barrier, std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m,
                int x_dtype, int w_dtype, int form, int tile, int device, Address stream);

// The same for layers that share x (q, k, v; gate, up): one first product over all their V, then every member's second
// one. V stores the members' (r, n) one under another as (R, n), R = the sum of r; d, base, scale, work have R columns,
// one member's beside the next's. Member i, of at most four: U[i] (m[i], r[i]), bias[i] (m[i],) or 0, y[i] (T, m[i]).
// kFma: a launch for x V and one for every member; the tensor-core forms: as many launches as for one layer, the
// second products of all members in one. A tensor-core form wants every r[i] in multiples of 8 (16 with 8 bits).
// A member's bits are those of svf_decode for it alone, in the same form.
void svf_group(Address x, std::int64_t x_stride, const std::vector<Address>& U, Address V, Address d,
               std::int64_t d_stride, std::int64_t slots, Address slot, Address base, const std::vector<Address>& bias,
               Address scale, const std::vector<Address>& y, Address work, Address barrier, std::int64_t T,
               std::int64_t n, const std::vector<std::int64_t>& r, const std::vector<std::int64_t>& m, int x_dtype,
               int w_dtype, int form, int tile, int device, Address stream);

}  // namespace t2::cuda
