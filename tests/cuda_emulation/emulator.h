// Runs CUDA kernels on the CPU, so that the very sources under csrc/cuda are tested numerically without a GPU.
//
// Each thread of a block is a fiber (a stack of its own, switched in user space); blocks run one after another. A
// fiber runs until it meets the others: at __syncthreads (whole block) or at a shuffle (its warp). Between two such
// points the threads of a block run one by one, in an order that `order` chooses: ascending, descending or
// shuffled. A kernel that forgets a barrier gives other numbers in another order; a barrier that not every thread
// reaches is reported as an error instead of a hang.
//
// What it cannot show: speed, memory coalescing, anything of the memory model beyond barriers.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int WARP_SIZE = 32;

class Block {
 public:
  // Runs body() once per thread, with threadIdx set.
  void run(int threads, int order, const std::function<void()>& body);

  void barrier();                                             // called by a fiber: wait for the block
  std::uint32_t exchange(std::uint32_t value, int lane_mask);  // called by a fiber: value of lane ^ lane_mask

 private:
  enum class State { ready, at_barrier, at_shuffle, done };
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state = State::ready;
    std::uint32_t offered = 0, received = 0;
    int lane_mask = 0;
  };
  static void entry();
  void wait(State why);
  bool release();  // lets go whoever has met; false if nobody could be

  std::vector<Fiber> fibers_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  int current_ = 0;
};

extern Block block;
extern int order;          // 0 ascending, 1 descending, otherwise the seed of a shuffle
extern std::string error;  // of the last launch, "" if none
extern Index block_index, grid_size, thread_index, block_size;

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body);

}  // namespace emulator
