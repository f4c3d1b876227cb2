// A barrier for all blocks of one cooperative launch.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace t2::cuda {

// Two counters, zero before the launch. The last block to leave sets them to zero again, so whoever owns them zeroes
// them once, not once per call; no two launches that may run at the same time may share them.
constexpr int BARRIER_COUNTERS = 2;

// About five seconds; a block that waits longer waits for ever.
constexpr long long BARRIER_CYCLES = 1LL << 33;

// What any block wrote before is seen by all of them after. All threads of all blocks call, once per launch.
__device__ __forceinline__ void grid_barrier(std::uint32_t* counters) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const std::uint32_t blocks = gridDim.x;
    __threadfence();
    atomicAdd(&counters[0], 1u);
    const long long begin = clock64();
    while (load_acquire(&counters[0]) < blocks) {
      if (clock64() - begin > BARRIER_CYCLES) trap();
    }
    if (atomicAdd(&counters[1], 1u) == blocks - 1) {
      counters[0] = 0;
      counters[1] = 0;
    }
  }
  __syncthreads();
}

}  // namespace t2::cuda
