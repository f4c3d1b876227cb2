#include "emulator.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>

namespace emulator {

Block block;
int order = 0;
std::string error;
Index block_index, grid_size, thread_index, block_size;

namespace {
constexpr std::size_t STACK_BYTES = 128 * 1024;
}

void Block::entry() {
  (*block.body_)();
  block.fibers_[block.current_].state = State::done;
  swapcontext(&block.fibers_[block.current_].context, &block.scheduler_);
}

void Block::wait(State why) {
  Fiber& self = fibers_[current_];
  self.state = why;
  swapcontext(&self.context, &scheduler_);
}

void Block::barrier() { wait(State::at_barrier); }

std::uint32_t Block::exchange(std::uint32_t value, int lane_mask) {
  Fiber& self = fibers_[current_];
  self.offered = value;
  self.lane_mask = lane_mask;
  wait(State::at_shuffle);
  return self.received;
}

bool Block::release() {
  const int threads = static_cast<int>(fibers_.size());
  bool any = false;
  for (int first = 0; first < threads; first += WARP_SIZE) {
    const int last = std::min(first + WARP_SIZE, threads);
    const bool met = std::all_of(fibers_.begin() + first, fibers_.begin() + last, [&](const Fiber& f) {
      return f.state == State::at_shuffle && f.lane_mask == fibers_[first].lane_mask;
    });
    if (!met) continue;
    for (int i = first; i < last; ++i) {
      const int other = first + ((i - first) ^ fibers_[i].lane_mask);
      fibers_[i].received = other < last ? fibers_[other].offered : fibers_[i].offered;
      fibers_[i].state = State::ready;
    }
    any = true;
  }
  const bool all = std::all_of(fibers_.begin(), fibers_.end(),
                               [](const Fiber& f) { return f.state == State::at_barrier; });
  if (all) {
    for (Fiber& f : fibers_) f.state = State::ready;
    any = true;
  }
  return any;
}

void Block::run(int threads, int run_order, const std::function<void()>& body) {
  body_ = &body;
  fibers_.resize(threads);
  std::vector<int> sequence(threads);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (run_order == 1) std::reverse(sequence.begin(), sequence.end());
  std::mt19937 random(static_cast<unsigned>(run_order));
  for (Fiber& f : fibers_) {
    f.stack.resize(STACK_BYTES);
    f.state = State::ready;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Block::entry, 0);
  }
  for (;;) {
    if (run_order > 1) std::shuffle(sequence.begin(), sequence.end(), random);
    for (const int i : sequence) {
      if (fibers_[i].state != State::ready) continue;
      current_ = i;
      thread_index.x = static_cast<unsigned>(i);
      swapcontext(&scheduler_, &fibers_[i].context);
    }
    if (std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.state == State::done; })) return;
    if (!release()) throw std::runtime_error("threads of one block wait at different barriers or shuffles");
  }
}

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  grid_size.x = blocks;
  block_size.x = threads;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index.x = b;
    block.run(static_cast<int>(threads), order, body);
  }
}

}  // namespace emulator

extern "C" void emulator_set_order(int order) { emulator::order = order; }
