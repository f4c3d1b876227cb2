// Reading N consecutive elements as fp32, by 16-byte loads or one by one. Both give the same values in the same
// places, so the choice between them (alignment) never changes a result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "convert.cuh"

namespace t2::cuda {

constexpr int LOAD_BYTES = 16;

// `from` is 16-byte aligned and N elements are there.
template <typename T, int N>
__device__ __forceinline__ void load_vector(const T* from, float (&to)[N]) {
  constexpr int PER_LOAD = LOAD_BYTES / static_cast<int>(sizeof(T));
  static_assert(N % PER_LOAD == 0, "whole 16-byte loads");
#pragma unroll
  for (int i = 0; i < N; i += PER_LOAD) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from + i);
    T element[PER_LOAD];
    std::memcpy(element, &raw, sizeof(raw));
#pragma unroll
    for (int j = 0; j < PER_LOAD; ++j) to[i + j] = to_float(element[j]);
  }
}

// Any alignment; only the first `valid` elements are there, the rest reads as zero.
template <typename T, int N>
__device__ __forceinline__ void load_elements(const T* from, std::int64_t valid, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = i < valid ? to_float(from[i]) : 0.0f;
}

// Host: may rows of this operand be read by load_vector, `per_thread` elements at a time?
template <typename T>
inline bool vector_rows(const T* base, std::int64_t stride, std::int64_t length, int per_thread) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(base) % LOAD_BYTES == 0;
  const std::int64_t row_bytes = stride * static_cast<std::int64_t>(sizeof(T));
  return aligned && row_bytes % LOAD_BYTES == 0 && length % per_thread == 0;
}

}  // namespace t2::cuda
