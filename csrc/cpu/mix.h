// Mixtures of experts into rows of an arena: part of the public C++ surface (svf_cpu.h has the conventions).
#pragma once

#include "svf_cpu.h"

namespace t2::cpu {

// out[rows[i]] = S * (1 + sum_k alpha[i, k] (z[indices[i, k]] - 1)) for all i < B, every layer's columns at once.
//   S (R,) fp32; Z (experts, R), row stride z_stride, z_dtype kF32: z, or kBF16: z - 1
//   alpha (B, K) fp32, or (B, layers, K) where offsets (layers + 1,) int64 says at which column each layer begins
//   indices (B, K) int32, -1 = none, or 0: column k is expert k. rows (B,) int32, -1 = write none, or 0: row i
//   out (slots, R) fp32, row stride out_stride; no other row is touched
// Experts are added in the order of the columns, each step rounded to fp32 (no fused multiply-add), and an expert of
// weight 0 adds nothing: the bits are those of the same sum in torch. An index outside [-1, experts) gives a row of
// NaN; a row outside [-1, slots) throws, and then nothing is written. No two entries of rows may be equal but -1.
void mix(Address S, Address Z, std::int64_t z_stride, std::int64_t experts, int z_dtype, Address alpha,
         Address indices, Address rows, Address offsets, std::int64_t layers, Address out, std::int64_t out_stride,
         std::int64_t slots, std::int64_t B, std::int64_t K, std::int64_t R, int n_threads);

}  // namespace t2::cpu
