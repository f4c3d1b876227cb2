// Stands in for CUDA's header of this name: just what csrc/cuda uses, on top of emulator.h.
#pragma once

#include <cmath>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// For launches whose blocks run one after another: one copy serves them all, what a block left is garbage to the next.
#define __shared__ static

#define CUDART_VERSION 0

inline const emulator::Index &blockIdx = emulator::block_index, &threadIdx = emulator::thread_index;
inline const emulator::Index &blockDim = emulator::block_size, &gridDim = emulator::grid_size;

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));

struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));

struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));

inline void __stcg(float4* to, float4 value) { *to = value; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

using std::nanf;

// Rounded once each: the emulation is compiled without contraction.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() {
  emulator::warp_meets([](void* (&)[32]) {}, nullptr);
}
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  const unsigned before = *counter;
  *counter += value;
  return before;
}

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  struct Lane {
    float offered, received;
    int lane_mask;
  } own{value, 0, lane_mask};
  emulator::warp_meets(
      [](void* (&lanes)[32]) {
        for (int i = 0; i < 32; ++i) {
          Lane& lane = *static_cast<Lane*>(lanes[i]);
          const Lane& other = *static_cast<Lane*>(lanes[i ^ lane.lane_mask]);
          if (other.lane_mask != lane.lane_mask) throw std::runtime_error("lanes of one shuffle want different ones");
          lane.received = other.offered;
        }
      },
      &own);
  return own.received;
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = struct EmulatedStream*;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
union cudaLaunchAttributeValue {
  int cooperative, programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaSuccess                          ? "cudaSuccess"
         : status == cudaErrorCooperativeLaunchTooLarge ? "cudaErrorCooperativeLaunchTooLarge"
                                                        : "emulator";
}
inline const char* cudaGetErrorString(cudaError_t) { return emulator::error.c_str(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(emulator::devices.size())) return cudaErrorInvalidValue;
  emulator::device = device;
  return cudaSuccess;
}

// Nothing is ever captured here.
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++emulator::questions;
  const emulator::Machine& m = emulator::devices.at(device);
  const int values[] = {m.multiprocessors, m.block_shared_bytes, m.multiprocessor_shared_bytes, m.capability / 10,
                        m.capability % 10};
  *value = values[attribute];
  return cudaSuccess;
}

// Shared memory that a kernel may be given on a device.
inline std::map<std::pair<const void*, int>, int> emulated_shared_limits;
inline int& emulated_shared_limit(const void* kernel) {
  return emulated_shared_limits.try_emplace({kernel, emulator::device}, 48 * 1024).first->second;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute attribute, int bytes) {
  ++emulator::questions;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (bytes > emulator::devices.at(emulator::device).block_shared_bytes) return cudaErrorInvalidValue;
  emulated_shared_limit(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes;
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  ++emulator::questions;
  *attributes = {0, emulator::devices.at(emulator::device).capability};
  return cudaSuccess;
}

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  emulator::Launch launch{config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, false, false, {}};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeCooperative) launch.cooperative = a.val.cooperative != 0;
    if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      launch.programmatic = a.val.programmaticStreamSerializationAllowed != 0;
    }
  }
  const emulator::Machine& m = emulator::devices.at(emulator::device);
  const int limit = emulated_shared_limit(reinterpret_cast<const void*>(kernel));
  if (static_cast<int>(launch.shared_bytes) > limit) return cudaErrorInvalidValue;
  const int resident = m.multiprocessor_shared_bytes / static_cast<int>(launch.shared_bytes + 1024);
  if (launch.cooperative && static_cast<int>(launch.blocks) > m.multiprocessors * resident) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  const std::tuple<Expected...> arguments(std::forward<Given>(given)...);
  launch.body = [kernel, arguments] { std::apply(kernel, arguments); };
  try {
    emulator::enqueue(launch);
  } catch (const std::exception& problem) {
    emulator::error = problem.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
