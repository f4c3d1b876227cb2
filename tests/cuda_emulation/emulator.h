// Runs CUDA kernels on the CPU, so that the very sources under csrc/cuda are tested numerically without a GPU.
//
// Each thread of a block is a fiber (a stack of its own, switched in user space). A fiber runs until it meets the
// others: at __syncthreads (whole block) or at a shuffle or tensor-core instruction (its warp). Between two such
// points the threads run one by one, in an order that `order` chooses: ascending, descending or shuffled. A kernel
// that forgets a barrier gives other numbers in another order; a barrier that not every thread reaches is reported
// as an error instead of a hang.
//
// Blocks run one after another, except in a cooperative launch, whose blocks take turns like threads; one that waits
// for a block that never comes is reported. A launch that may start before the one in front of it has ended does so:
// it runs up to the point where all of its threads wait for that one, and only then does the one in front run at all.
// What it reads too early is therefore never there.
//
// Asynchronous copies read their source when they are issued and land at once, or, where `late_copies` is set, only
// when a thread waits for them: too late for a kernel that forgets to wait.
//
// What it cannot show: speed, bank conflicts, the rounding inside a tensor core, the memory model beyond barriers.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int WARP_SIZE = 32;

struct Machine {
  int multiprocessors = 3, block_shared_bytes = 232448, multiprocessor_shared_bytes = 233472, capability = 90;
};

struct Launch {
  unsigned blocks = 0, threads = 0;
  std::size_t shared_bytes = 0;
  bool cooperative = false;   // all blocks at once
  bool programmatic = false;  // may start before the launch in front of it has ended
  std::function<void()> body;
};

// What the lanes of a warp do together once all of them have come, each with its own arguments.
using WarpOperation = void (*)(void* (&arguments)[WARP_SIZE]);

// Called by a fiber.
void block_barrier();
void warp_meets(WarpOperation operation, void* arguments);
void spin();                        // lets the others run
void wait_for_the_launch_before();  // programmatic launches only; else returns at once
void copy_16(void* shared, const void* from, bool there);
void copies_commit();
void copies_wait(int pending);
unsigned char* shared_memory();
void require_shared(const void* address, std::size_t bytes);  // throws unless it lies in the block's, aligned to bytes

// Host side. A launch runs when the next one comes or at flush(), so that a programmatic one can overtake it.
void enqueue(const Launch& launch);
void flush();

extern int order;         // 0 ascending, 1 descending, otherwise the seed of a shuffle
extern bool late_copies;
extern std::string error;  // of the last launch, "" if none
extern std::vector<Machine> devices;  // never fewer: what was asked of a device stays true
extern int device;                    // the current one
extern int questions;                 // about devices and kernels, by the host code
extern Index block_index, grid_size, thread_index, block_size;

}  // namespace emulator
