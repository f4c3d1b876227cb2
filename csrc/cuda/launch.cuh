// Host side of a launch: the right device, the given stream, errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace t2::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("t2kernels: ") + what + " failed: " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

// Makes `device` current while it lives. Torch has a CUDA runtime of its own; both see the driver's current
// context, so the former device must come back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (former_ != device_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int former_ = 0;
};

// An answer for each device, asked for once and kept, by any thread: a launch has no time for questions to the runtime.
// `ask` must be legal in a capture of a stream; where it throws, the next call asks again.
template <typename Answer>
class OncePerDevice {
 public:
  template <typename Ask>
  const Answer& of(int device, Ask ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = answers_.find(device);
    return found != answers_.end() ? found->second : answers_.emplace(device, ask()).first->second;
  }

 private:
  std::mutex mutex_;
  std::map<int, Answer> answers_;  // references to its values stay
};

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int shared_bytes = 0;
  cudaLaunchAttribute attribute = {};
  unsigned attributes = 0;  // 1: `attribute` counts
};

template <typename... Expected, typename... Given>
void launch(void (*kernel)(Expected...), const char* what, LaunchShape shape, cudaStream_t stream,
            Given&&... arguments) {
  if (shape.blocks > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument(std::string("t2kernels: ") + what + ": too large for one grid, " +
                                std::to_string(shape.blocks) + " blocks. Split the call along the tokens.");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &shape.attribute;
  config.numAttrs = shape.attributes;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(arguments)...), what);
}

}  // namespace t2::cuda
