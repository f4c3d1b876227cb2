// A barrier for all blocks of one cooperative launch.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace t2::cuda {

// Two counters, zero before the launch. The last block to leave sets them to zero again, so whoever owns them zeroes
// them once, not once per call; no two launches that may run at the same time may share them.
constexpr int BARRIER_COUNTERS = 2;

// After so many looks at the counter a block waits for one that never comes, because a launch beside this one uses the
// same counters. A look is a read from L2, so this is half a minute or more (at 0.3 us or more a look, an assumption).
// Looks, not clocks: a clock runs on while a block is preempted (by time slicing, by a debugger), and a trap ends the
// context of the whole process.
constexpr std::uint32_t BARRIER_LOOKS = 100'000'000;

// What any block wrote before is seen by all of them after. All threads of all blocks call, once per launch.
__device__ __forceinline__ void grid_barrier(std::uint32_t* counters, std::uint32_t most_looks = BARRIER_LOOKS) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const std::uint32_t blocks = gridDim.x;
    __threadfence();
    atomicAdd(&counters[0], 1u);
    for (std::uint32_t looks = 0; load_acquire(&counters[0]) < blocks; ++looks) {
      if (looks == most_looks) trap();
    }
    if (atomicAdd(&counters[1], 1u) == blocks - 1) {
      counters[0] = 0;
      counters[1] = 0;
    }
  }
  __syncthreads();
}

}  // namespace t2::cuda
