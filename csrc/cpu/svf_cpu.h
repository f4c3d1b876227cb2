// CPU kernels of t2kernels: the public C++ surface, included by csrc/bindings.cpp.
//
//     y = ((x V) * d_row) U^T + bias        d_row(t) = D[slot[t]], or `base` where slot[t] = -1
//
// How to build. Sources: all *.cpp of this folder
//   every file          -std=c++17 -O3 -fPIC -ffp-contract=off   (no -ffast-math, no -march=native, no -fopenmp)
//   isa_avx2.cpp        + -mavx2 -mfma -mf16c                                                    (x86-64 only)
//   isa_avx512.cpp      + -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c                (x86-64 only)
//   isa_avx512bf16.cpp  + the line above + -mavx512bf16 -mavx512vbmi                             (x86-64 only)
//   link                ${CMAKE_DL_LIBS} and Threads::Threads; no OpenMP library.
// On other machines, or where the compiler lacks a flag, leave the flags away: the file then compiles to an
// empty table and the next lower instruction set is used. Threads come from the OpenMP runtime that is already
// in the process (torch's own): threads.cpp looks its entry points up at run time, so that two runtimes never
// compete for the cores, and any compiler will do.
//
// Addresses are plain integers (tensor.data_ptr()), 0 = absent. Strides count elements. All functions may be
// called without the GIL. Wrong codes or sizes, and a slot outside [-1, slots), throw std::invalid_argument.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace t2::cpu {

using Address = std::uintptr_t;

// Type codes, shared with Python.
enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kF8 = 4 };  // kF8: e4m3fn, read as finite

// Instruction-set codes. kAuto = the best one this machine has, or the one T2_CPU_ISA names
// ("scalar", "avx2", "avx512", "avx512bf16"; read once).
enum Isa : int { kAuto = -1, kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// Name of what `isa` resolves to here; throws when this machine lacks it.
std::string isa_name(int isa);
// Names of all sets this machine can run, best first.
std::vector<std::string> isa_available();
// Code of a name ("auto" included); throws on an unknown name.
int isa_code(const std::string& name);
// "libgomp.so.1 (/path)" of the runtime whose threads are used, or "std::thread" / "none".
std::string thread_runtime();

// Both products in one parallel region. x (T, n) x_dtype, row stride x_stride; V stored (r, n), U (m, r), both
// contiguous in w_dtype (== x_dtype, or kI8, kF8); d fp32: (r,) when slot = 0, else (slots, r) with row stride
// d_stride; slot (T,) int32; base (r,) fp32, used where slot = -1 (0: zeros); bias (m,) x_dtype or 0; scale (r,)
// fp32 or 0, multiplied beside d; y (T, m) contiguous x_dtype; h (T, r) contiguous x_dtype or 0: unscaled x V.
// fp32 accumulation. Bits of a row depend on nothing but this row, the factors and the instruction set.
void svf_forward(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                 std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h, std::int64_t T,
                 std::int64_t n, std::int64_t r, std::int64_t m, int x_dtype, int w_dtype, int n_threads, int isa);

// Layers that share x. Their V are stored one under another (R, n), R = the sum of their ranks, their d, base and scale
// beside each other (R columns); member i has U[i] (m[i], r[i]), bias[i] (m[i],) or 0, y[i] (T, m[i]). One parallel
// region: the first product once, then every member's second one. A member's bits are those of svf_forward for it alone.
void svf_group(Address x, std::int64_t x_stride, const std::vector<Address>& U, Address V, Address d,
               std::int64_t d_stride, std::int64_t slots, Address slot, Address base, const std::vector<Address>& bias,
               Address scale, const std::vector<Address>& y, std::int64_t T, std::int64_t n,
               const std::vector<std::int64_t>& r, const std::vector<std::int64_t>& m, int x_dtype, int w_dtype,
               int n_threads, int isa);

// y = x W^T + bias: x (T, n) row stride x_stride, W (m, n) contiguous, y (T, m) contiguous. Same kernel, same
// promise about bits. w_dtype == x_dtype.
void linear(Address x, std::int64_t x_stride, Address W, Address bias, Address y, std::int64_t T, std::int64_t n,
            std::int64_t m, int x_dtype, int w_dtype, int n_threads, int isa);

// out[t] = h[t] * d_row(t) (* scale), rounded once; out may be h. h (T, r) stride h_stride, out stride out_stride.
void scale_rows(Address h, std::int64_t h_stride, Address out, std::int64_t out_stride, Address d,
                std::int64_t d_stride, std::int64_t slots, Address slot, Address base, Address scale, std::int64_t T,
                std::int64_t r, int dtype, int n_threads, int isa);

// One pass of the backward over gu = g U (T, r) and h = x V (T, r), both in dtype:
//   dd[s] = sum over t with slot[t] = s of scale * h[t] * gu[t]     (slots, r) fp32 contiguous; slots = 1 when slot = 0
//   gu[t] = gu[t] * d_row(t) * scale                                in place
// dd = 0 skips the sum (h = 0 leaves it zero), d = 0 skips the product. The order of the sum is t = 0, 1, ..., in blocks of a
// fixed length: independent of the number of threads.
void backward_rows(Address gu, std::int64_t gu_stride, Address h, std::int64_t h_stride, Address d,
                   std::int64_t d_stride, std::int64_t slots, Address slot, Address base, Address scale, Address dd,
                   std::int64_t T, std::int64_t r, int dtype, int n_threads, int isa);

// out (rows, cols) = q (rows, cols) in q_dtype (kI8, kF8) * scale; scale_axis 0: scale (rows,), 1: scale (cols,); scale = 0: ones.
void dequantise(Address q, int q_dtype, Address scale, int scale_axis, Address out, std::int64_t rows, std::int64_t cols,
                int dtype, int n_threads, int isa);

// One pass that reads the caller's memory with n_threads threads, in GB/s (1e9): the ceiling of a product whose weights
// these are, on the same pages.
double read_bandwidth(Address data, std::int64_t bytes, int n_threads);

}  // namespace t2::cpu
