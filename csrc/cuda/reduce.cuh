// Sums in a fixed order: no atomics, same bits from run to run and whatever else the grid computes.
#pragma once

#include <cuda_runtime.h>

namespace t2::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The step of warp_sums at DISTANCE, with COUNT values left per lane.
template <int COUNT, int DISTANCE, int N>
__device__ __forceinline__ float warp_sums_from(float (&value)[N], int lane) {
  // Recursion, not a loop: the indices must be constants, or the array leaves the registers.
  if constexpr (DISTANCE == 0) {
    return value[0];
  } else if constexpr (COUNT > 1) {
    constexpr int HALF = COUNT / 2;
    const bool upper = (lane & DISTANCE) != 0;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float give = upper ? value[i] : value[i + HALF];
      const float keep = upper ? value[i + HALF] : value[i];
      value[i] = keep + __shfl_xor_sync(ALL_LANES, give, DISTANCE);
    }
    return warp_sums_from<HALF, DISTANCE / 2>(value, lane);
  } else {
    value[0] += __shfl_xor_sync(ALL_LANES, value[0], DISTANCE);
    return warp_sums_from<1, DISTANCE / 2>(value, lane);
  }
}

// N sums over the warp at once: lane l returns the warp's sum of value[l / (WARP / N)]. All 32 lanes must call it.
// In each step a lane hands half of its values to its partner and adds what it gets to the other half: N - 1
// shuffles (and a few for small N) where one tree per value would take 5 N. Whatever N is, lanes are added in the
// same tree (distance 16, 8, 4, 2, 1), so a sum has the same bits for every N.
template <int N>
__device__ __forceinline__ float warp_sums(float (&value)[N], int lane) {
  static_assert(N >= 1 && N <= WARP && (N & (N - 1)) == 0, "a power of two, at most one value per lane");
  return warp_sums_from<N, WARP / 2>(value, lane);
}

// Thread i < N returns the sum over the block of value[i]; warps are added first to last. Destroys `value`. All
// threads must call it, once per kernel (`partial` is not protected against a second use).
template <int WARPS, int N>
__device__ __forceinline__ float block_sums(float (&value)[N], float (&partial)[WARPS][N]) {
  constexpr int LANES_PER_SUM = WARP / N;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % WARP;
  const float sum = warp_sums(value, lane);
  if (lane % LANES_PER_SUM == 0) partial[thread / WARP][lane / LANES_PER_SUM] = sum;
  __syncthreads();
  float total = 0.0f;
  if (thread < N) {
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += partial[warp][thread];
  }
  return total;
}

}  // namespace t2::cuda
