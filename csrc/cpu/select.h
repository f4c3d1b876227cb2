// Choice of the instruction set, and the checks that every entry point shares.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernel_table.h"
#include "svf_cpu.h"

namespace t2::cpu {

// The functions of `isa` (kAuto: the best, or T2_CPU_ISA's); throws when this machine or build lacks it.
const KernelTable& table(int isa);

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline void check_size(const char* name, std::int64_t value, std::int64_t least) {
  if (value >= least) return;
  refuse(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

inline void check_dtype(const char* name, int dtype) {
  if (dtype >= kF32 && dtype <= kF16) return;
  refuse(std::string(name) + " must be 0 (fp32), 1 (bf16) or 2 (fp16), got " + std::to_string(dtype));
}

inline bool is_eight_bit(int dtype) { return dtype == kI8 || dtype == kF8; }

inline std::int64_t bytes_of(int dtype) { return dtype == kF32 ? 4 : is_eight_bit(dtype) ? 1 : 2; }

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace t2::cpu
