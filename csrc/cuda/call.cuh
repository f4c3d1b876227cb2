// One call of svf_decode or svf_group with its types known, and what happens to a finished sum. Shared by all kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.cuh"

namespace t2::cuda {

// Layers that share x, at most.
constexpr int MAX_MEMBERS = 4;

// One of them, with its own second product: y = work[:, column : column + r] U^T + bias.
struct DecodeMember {
  const void *U, *bias;
  void* y;
  std::int64_t r, m, column;
};

// Filled in by svf_cuda.cu, run by the file of its types. A layer alone is a group of one.
struct DecodeCall {
  const void *x, *V;
  const float *d, *base, *scale;
  const std::int32_t* slot;
  void *h, *work;
  std::uint32_t* barrier;
  std::int64_t x_stride, d_stride, slots, T, n, r;  // r: of all members together
  DecodeMember member[MAX_MEMBERS];
  int members;
  int form, tile;
  int device;
  cudaStream_t stream;
};

// work[t, j] = sum * d_row(t)[j] * scale[j], and h[t, j] = sum.
template <typename Out, typename Work>
struct ScaleByDiagonal {
  Work* work;               // (T, r)
  Out* h;                   // (T, r) or null
  const float* d;           // (r,), or (slots, r) with row stride d_stride when slot is given
  std::int64_t d_stride;
  std::int64_t slots;
  const std::int32_t* slot;  // (T,) or null
  const float* base;        // (r,) or null for zeros
  const float* scale;       // (r,) or null
  std::int64_t rank;

  static ScaleByDiagonal of(const DecodeCall& c) {
    return {static_cast<Work*>(c.work), static_cast<Out*>(c.h), c.d, c.d_stride, c.slots, c.slot, c.base, c.scale, c.r};
  }

  __device__ __forceinline__ float diagonal(std::int64_t token, std::int64_t j) const {
    if (slot == nullptr) return d[j];
    const std::int32_t s = slot[token];
    if (s >= 0 && s < slots) return d[s * d_stride + j];
    if (s == -1) return base == nullptr ? 0.0f : base[j];
    return nanf("");
  }

  __device__ __forceinline__ void operator()(std::int64_t token, std::int64_t j, float sum) const {
    if (h != nullptr) h[token * rank + j] = from_float<Out>(sum);
    const float scaled = scale == nullptr ? sum : sum * scale[j];
    work[token * rank + j] = from_float<Work>(scaled * diagonal(token, j));
  }
};

// y[t, i] = sum + bias[i], rounded once.
template <typename Out>
struct AddBias {
  Out* y;           // (T, m)
  const Out* bias;  // (m,) or null
  std::int64_t out_features;

  static AddBias of(const DecodeMember& m) { return {static_cast<Out*>(m.y), static_cast<const Out*>(m.bias), m.m}; }

  __device__ __forceinline__ void operator()(std::int64_t token, std::int64_t i, float sum) const {
    const float shift = bias == nullptr ? 0.0f : to_float(bias[i]);
    y[token * out_features + i] = from_float<Out>(sum + shift);
  }
};

}  // namespace t2::cuda
