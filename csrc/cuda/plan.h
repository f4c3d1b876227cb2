// How a tensor-core launch fills the machine: stages of the ring, blocks, shared memory. Plain host code.
#pragma once

#include <algorithm>
#include <cstdint>

namespace t2::cuda {

constexpr int MIN_STAGES = 2;
constexpr int MAX_STAGES = 8;
// What the machine keeps of a multiprocessor's shared memory for each block on it (sm_80 to sm_120).
constexpr int RESERVED_SHARED_BYTES = 1024;

struct Machine {
  int multiprocessors;
  int block_shared_bytes;           // most for one block, opted in
  int multiprocessor_shared_bytes;  // for all blocks of one multiprocessor
  int capability;                   // 10 major + minor
};

struct Plan {
  int stages;  // 0: the tile does not fit this machine
  int per_multiprocessor;
  int blocks;
  int shared_bytes;
};

// Two blocks a multiprocessor where every product has work for them, each with half of the memory and as many stages
// as that holds; else one block with all of it. `least` and `most` are the items of the launch's products. Where
// another kernel runs beside this one (`beside`), one of the two blocks is that kernel's.
inline Plan plan(int stage_bytes, int reduction_bytes, std::int64_t least, std::int64_t most, bool beside,
                 const Machine& machine) {
  const int wanted = beside || least > machine.multiprocessors ? 2 : 1;
  for (int parts = wanted; parts >= 1; --parts) {
    const int budget =
        std::min(machine.block_shared_bytes, machine.multiprocessor_shared_bytes / parts - RESERVED_SHARED_BYTES);
    const int stages = std::min(MAX_STAGES, (budget - reduction_bytes) / stage_bytes);
    // An assumption, not measured: two rings of two stages are no better than one that is deeper.
    if (stages < (parts == 1 ? MIN_STAGES : MIN_STAGES + 1)) continue;
    const int per = beside ? 1 : parts;
    const std::int64_t room = static_cast<std::int64_t>(machine.multiprocessors) * per;
    return {stages, per, static_cast<int>(std::min(most, room)), stages * stage_bytes + reduction_bytes};
  }
  return {0, 0, 0, 0};
}

}  // namespace t2::cuda
