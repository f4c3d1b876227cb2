// Helpers of the entry points: the diagonal of every token, and how many threads a job deserves.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "select.h"

namespace t2::cpu {

// The diagonal of every token as pointers; throws on a slot that does not exist.
struct DiagonalRows {
  std::vector<const float*> rows;
  std::vector<float> zeros;
  Diagonal view{};

  DiagonalRows(Address d, std::int64_t d_stride, std::int64_t slots, Address slot, Address base, Address scale,
               std::int64_t T, std::int64_t r) {
    view.scale = pointer<const float>(scale);
    if (!slot) {
      view.one = pointer<const float>(d);
      return;
    }
    const std::int32_t* s = pointer<const std::int32_t>(slot);
    rows.resize(static_cast<std::size_t>(T));
    for (std::int64_t t = 0; t < T; ++t) {
      if (s[t] < -1 || s[t] >= slots) {
        refuse("slot must lie in [-1, " + std::to_string(slots) + ") for d with " + std::to_string(slots) +
               " slots (-1 is the base), got " + std::to_string(s[t]) + " for token " + std::to_string(t) + ".");
      }
      if (s[t] >= 0) {
        rows[static_cast<std::size_t>(t)] = pointer<const float>(d) + s[t] * d_stride;
      } else {
        if (!base && zeros.empty()) zeros.resize(static_cast<std::size_t>(r));
        rows[static_cast<std::size_t>(t)] = base ? pointer<const float>(base) : zeros.data();
      }
    }
    view.rows = rows.data();
  }
};

// Below this many bytes of weights a second thread costs more than it brings. Waking one that spins takes a few
// microseconds, one that sleeps (OMP_WAIT_POLICY=PASSIVE) some 35, in which one core reads 2 MiB (EPYC Zen 5).
// T2_CPU_BYTES_PER_THREAD says otherwise, before the first call.
inline std::int64_t bytes_per_thread() {
  static const std::int64_t bytes = [] {
    if (const char* given = std::getenv("T2_CPU_BYTES_PER_THREAD"); given != nullptr && std::atoll(given) > 0) {
      return std::int64_t{std::atoll(given)};
    }
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    const bool sleeps = policy != nullptr && (*policy == 'P' || *policy == 'p');
    return std::int64_t{sleeps ? 2 << 20 : 128 << 10};
  }();
  return bytes;
}

inline int useful_threads(int n_threads, std::int64_t bytes) {
  const std::int64_t most = std::max<std::int64_t>(1, bytes / bytes_per_thread());
  return static_cast<int>(std::min<std::int64_t>(std::max(1, n_threads), most));
}

}  // namespace t2::cpu
