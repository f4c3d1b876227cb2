// What one instruction set offers to products.cpp, rows.cpp: plain function pointers, filled by isa_*.cpp.
#pragma once

#include <cstdint>

#include "threads.h"

namespace t2::cpu {

// The diagonal of every token, resolved: rows[t] is the fp32 vector that multiplies h[t].
struct Diagonal {
  const float* const* rows;  // (T,) pointers, or null: `one` for all tokens
  const float* one;          // null with rows null: no diagonal
  const float* scale;        // (r,) or null

  const float* row(std::int64_t t) const { return rows ? rows[t] : one; }
};

// out (T, rows) = act (T, k) * weight (rows, k)^T for one kind of weight. Two uses, told apart by the epilogue:
//   hidden: h = sums (optional, h_out in x's dtype), out_act = sums * diagonal, in the activation type of the kernel
//   output: y = sums + bias, in x's dtype
struct Product {
  const void* act;  // (T, k) activation type, row stride act_stride
  std::int64_t act_stride;
  const void* weight;  // (rows, k) contiguous
  std::int64_t k, rows, T;
  // hidden
  void* h_out;  // (T, rows) x dtype or null
  void* out_act;
  std::int64_t out_act_stride;
  Diagonal diagonal;
  // output
  const void* bias;
  void* y;
  const void* next;  // weights that this thread reads after this product: warmed at the end; or null
};

struct Kernel {
  // Bytes of one activation element, and whether x itself is in the activation type (then it is not packed).
  int act_bytes;
  bool x_is_act;
  int row_unit;    // rows a thread should take at a time
  int token_tile;  // tokens in one register tile
  void (*pack)(const void* x, void* act, std::int64_t count);
  void (*hidden)(const Product& p, std::int64_t row_begin, std::int64_t row_end);
  void (*output)(const Product& p, std::int64_t row_begin, std::int64_t row_end);
};

// Element-wise passes over `count` elements of one row.
struct RowKernels {
  void (*scale_row)(const void* in, void* out, const float* d, const float* scale, std::int64_t count);
  // sum[i] += h[i] * gu[i]
  void (*accumulate)(const void* gu, const void* h, float* sum, std::int64_t count);
  // out[i] = q[i] * (row_scale * col_scale[i]) for int8 and for fp8 q; col_scale may be null
  void (*dequantise_int8)(const void* q, float row_scale, const float* col_scale, void* out, std::int64_t count);
  void (*dequantise_fp8)(const void* q, float row_scale, const float* col_scale, void* out, std::int64_t count);
};

struct KernelTable {
  const char* name;
  Kernel same[3];   // weights in x's dtype: fp32, bf16, fp16
  Kernel int8[3];   // int8 weights, by x's dtype
  Kernel fp8[3];    // fp8 weights, likewise
  RowKernels rows[3];
  float (*read_stream)(const void* data, std::int64_t bytes);
};

// Null when the file was compiled without the flags it needs.
const KernelTable* scalar_table();
const KernelTable* avx2_table();
const KernelTable* avx512_table();
const KernelTable* avx512bf16_table();

}  // namespace t2::cpu
