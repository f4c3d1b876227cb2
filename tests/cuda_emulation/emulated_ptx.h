// Stands in for csrc/cuda/ptx.cuh: the same functions in plain C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace t2::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }

inline uint2 load_8(int offset) {
  emulator::require_shared(dynamic_shared() + offset, sizeof(uint2));
  return *reinterpret_cast<const uint2*>(dynamic_shared() + offset);
}

inline void copy_16(int offset, const void* from, bool there) {
  emulator::copy_16(dynamic_shared() + offset, from, there);
}
inline void copies_commit() { emulator::copies_commit(); }
template <int PENDING>
inline void copies_wait() {
  emulator::copies_wait(PENDING);
}

inline void load_matrices(int row, std::uint32_t (&to)[4]) {
  struct Lane {
    const unsigned char* row;
    std::uint32_t* to;
  };
  Lane own{dynamic_shared() + row, to};
  emulator::require_shared(own.row, 16);
  emulator::warp_meets(
      [](void* (&lanes)[32]) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            const unsigned char* from = static_cast<Lane*>(lanes[8 * matrix + lane / 4])->row + lane % 4 * 4;
            std::memcpy(&static_cast<Lane*>(lanes[lane])->to[matrix], from, 4);
          }
        }
      },
      &own);
}

inline double element(std::uint16_t bits, __nv_bfloat16) { return __bfloat162float(__nv_bfloat16{bits}); }
inline double element(std::uint16_t bits, __half) {
  __half value;
  std::memcpy(&value, &bits, sizeof(value));
  return __half2float(value);
}

// Each sum in fp64, then rounded: a tensor core may round more often, in a way that is its own.
template <typename Element>
inline void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Lane {
    float* sum;
    const std::uint32_t* a;
    std::uint32_t b[2];
  };
  Lane own{sum, a, {b0, b1}};
  emulator::warp_meets(
      [](void* (&lanes)[32]) {
        double left[16][16], right[16][8];
        const auto half = [](std::uint32_t pair, int which) {
          return element(static_cast<std::uint16_t>(pair >> (16 * which)), Element{});
        };
        for (int lane = 0; lane < 32; ++lane) {
          const Lane& own = *static_cast<Lane*>(lanes[lane]);
          const int g = lane / 4, c = 2 * (lane % 4);
          for (int i = 0; i < 2; ++i) {
            left[g][c + i] = half(own.a[0], i), left[g + 8][c + i] = half(own.a[1], i);
            left[g][c + 8 + i] = half(own.a[2], i), left[g + 8][c + 8 + i] = half(own.a[3], i);
            right[c + i][g] = half(own.b[0], i), right[c + 8 + i][g] = half(own.b[1], i);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
            double total = static_cast<Lane*>(lanes[lane])->sum[i];
            for (int k = 0; k < 16; ++k) total += left[row][k] * right[k][column];
            static_cast<Lane*>(lanes[lane])->sum[i] = static_cast<float>(total);
          }
        }
      },
      &own);
}

inline std::uint32_t fma_bf16x2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t sum = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto half = [i](std::uint32_t two) { return element(static_cast<std::uint16_t>(two >> i), __nv_bfloat16{}); };
    const double total = half(a) * half(b) + half(c);
    sum |= static_cast<std::uint32_t>(__float2bfloat16_rn(static_cast<float>(total)).bits) << i;
  }
  return sum;
}

inline void let_the_next_kernel_start() {}
inline void wait_for_the_kernel_before() { emulator::wait_for_the_launch_before(); }

inline std::uint32_t load_acquire(const std::uint32_t* from) {
  emulator::spin();
  return *from;
}

[[noreturn]] inline void trap() { throw std::runtime_error("trap"); }

}  // namespace t2::cuda
