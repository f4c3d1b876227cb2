// What a layer's call asks of the machine besides the kernel: a product with all but x settled, whether values are what
// they were, the environment as it is now. Plain C++ on addresses; bindings.cpp makes Python functions of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "cpu/svf_cpu.h"

namespace t2 {

using Address = std::uintptr_t;

// svf_forward of cpu/svf_cpu.h for one set of factors and one table of diagonals.
struct PreparedForward {
  Address U, V, d, base, bias, scale;
  std::int64_t d_stride, slots, n, r, m;
  int x_dtype, w_dtype;

  // Where the tensors lie now.
  struct Now {
    Address U, V, d, base, bias;
  };

  bool moved(const Now& now) const {
    return now.U != U || now.V != V || now.d != d || now.base != base || now.bias != bias;
  }

  // x (T, n) and y (T, m), both contiguous; slot (T,) or 0.
  void run(Address x, Address y, std::int64_t T, Address slot, int n_threads) const {
    cpu::svf_forward(x, n, U, V, d, d_stride, slots, slot, base, bias, scale, y, 0, T, n, r, m, x_dtype, w_dtype,
                     n_threads, cpu::kAuto);
  }
};

// Whether two pieces of memory hold the same bytes.
inline bool same_bytes(Address a, Address b, std::size_t bytes) {
  return std::memcmp(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), bytes) == 0;
}

// A variable of the environment, as the process last set it.
inline std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

}  // namespace t2
