// Stands in for CUDA's header of this name: just what csrc/cuda uses, on top of emulator.h.
#pragma once

#include <cmath>
#include <cstring>
#include <exception>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another, so one copy serves them all; what a block left behind is garbage to the next.
#define __shared__ static

#define CUDART_VERSION 0

inline const emulator::Index &blockIdx = emulator::block_index, &threadIdx = emulator::thread_index;
inline const emulator::Index &blockDim = emulator::block_size, &gridDim = emulator::grid_size;

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

using std::nanf;

inline void __syncthreads() { emulator::block.barrier(); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = emulator::block.exchange(bits, lane_mask);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct EmulatedStream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorName(cudaError_t status) { return status == cudaSuccess ? "cudaSuccess" : "emulator"; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::error.c_str(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  const std::tuple<Expected...> arguments(std::forward<Given>(given)...);
  try {
    emulator::run_grid(config->gridDim.x, config->blockDim.x, [&] { std::apply(kernel, arguments); });
  } catch (const std::exception& problem) {
    emulator::error = problem.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
