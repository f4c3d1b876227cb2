// Sums in a fixed order: no atomics, same bits from run to run and whatever else the grid computes.
#pragma once

#include <cuda_runtime.h>

namespace t2::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Every lane gets the sum over the warp, added as a balanced tree. All 32 lanes must call it.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(ALL_LANES, value, distance);
  }
  return value;
}

// total[i] = sum over the block of value[i], for thread i < N; warps are added first to last. All threads must
// call it, once per kernel (`partial` is not protected against a second use).
template <int WARPS, int N>
__device__ __forceinline__ float block_sums(const float (&value)[N], float (&partial)[WARPS][N]) {
  static_assert(N <= WARPS * WARP, "one thread per sum");
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float sum = warp_sum(value[i]);
    if (thread % WARP == 0) partial[thread / WARP][i] = sum;
  }
  __syncthreads();
  float total = 0.0f;
  if (thread < N) {
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += partial[warp][thread];
  }
  return total;
}

}  // namespace t2::cuda
