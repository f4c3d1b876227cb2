#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

namespace emulator {

int order = 0;
bool late_copies = false;
std::string error;
std::vector<Machine> devices(1);
int device = 0, questions = 0;
Index block_index, grid_size, thread_index, block_size;

namespace {

constexpr std::size_t STACK_BYTES = 128 * 1024, CANARY_BYTES = 64;
constexpr unsigned char POISON = 0xff;  // NaN in every float type
constexpr int COPY_BYTES = 16;
unsigned last_blocks = 0;  // of a launch whose blocks run one after another, run these alone; 0: all
int launches[3];  // plain, programmatic, cooperative

enum class State { ready, at_barrier, at_warp, spinning, at_launch_before, done };

struct Copy {
  void* to;
  unsigned char data[COPY_BYTES];
};

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool started = false;
  State state = State::ready;
  unsigned block = 0, thread = 0;
  WarpOperation operation = nullptr;
  void* arguments = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// Stacks live on between launches.
std::vector<std::unique_ptr<char[]>> spare_stacks;

// Some blocks of one launch, all of which take turns.
class Turns {
 public:
  Turns(const Launch& launch, unsigned first, unsigned count, std::function<void()> launch_before);
  ~Turns();
  void run();

  static void entry();
  void wait(State why);

  Fiber* fiber = nullptr;  // the one that runs
  std::string problem;
  std::vector<std::vector<unsigned char>> shared;
  bool waits = false;  // whether there is a launch before
  unsigned first_block;

 private:
  void resume(Fiber& next);
  bool release_warps();
  bool release_blocks();
  bool release_launch();

  const Launch& launch_;
  std::function<void()> launch_before_;
  std::vector<Fiber> fibers_;
  jmp_buf scheduler_;
};

Turns* turns = nullptr;

Turns::Turns(const Launch& launch, unsigned first, unsigned count, std::function<void()> launch_before)
    : waits(launch_before != nullptr), first_block(first), launch_(launch), launch_before_(std::move(launch_before)),
      fibers_(static_cast<std::size_t>(count) * launch.threads) {
  shared.assign(count, std::vector<unsigned char>(launch.shared_bytes + CANARY_BYTES, POISON));
  for (std::size_t i = 0; i < fibers_.size(); ++i) {
    Fiber& f = fibers_[i];
    f.block = first + static_cast<unsigned>(i) / launch.threads;
    f.thread = static_cast<unsigned>(i) % launch.threads;
    if (spare_stacks.empty()) spare_stacks.emplace_back(new char[STACK_BYTES]);
    f.stack = std::move(spare_stacks.back());
    spare_stacks.pop_back();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK_BYTES;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Turns::entry, 0);
  }
}

Turns::~Turns() {
  for (Fiber& f : fibers_) spare_stacks.push_back(std::move(f.stack));
}

void Turns::entry() {
  try {
    turns->launch_.body();
  } catch (const std::exception& thrown) {
    turns->problem = thrown.what();
  }
  turns->wait(State::done);
}

// Jumps make no system call, which swapcontext does.
void Turns::wait(State why) {
  fiber->state = why;
  if (_setjmp(fiber->jump) == 0) _longjmp(scheduler_, 1);
}

void Turns::resume(Fiber& next) {
  fiber = &next;
  block_index.x = next.block;
  thread_index.x = next.thread;
  if (_setjmp(scheduler_) != 0) return;
  if (next.started) _longjmp(next.jump, 1);
  next.started = true;
  setcontext(&next.context);
}

bool Turns::release_warps() {
  bool any = false;
  for (std::size_t first = 0; first < fibers_.size(); first += WARP_SIZE) {
    const auto begin = fibers_.begin() + static_cast<std::ptrdiff_t>(first), end = begin + WARP_SIZE;
    const bool met = std::all_of(
        begin, end, [&](const Fiber& f) { return f.state == State::at_warp && f.operation == begin->operation; });
    if (!met) continue;
    void* arguments[WARP_SIZE];
    std::transform(begin, end, arguments, [](const Fiber& f) { return f.arguments; });
    begin->operation(arguments);
    std::for_each(begin, end, [](Fiber& f) { f.state = State::ready; });
    any = true;
  }
  return any;
}

bool Turns::release_blocks() {
  bool any = false;
  for (std::size_t first = 0; first < fibers_.size(); first += launch_.threads) {
    const auto begin = fibers_.begin() + static_cast<std::ptrdiff_t>(first), end = begin + launch_.threads;
    if (!std::all_of(begin, end, [](const Fiber& f) { return f.state == State::at_barrier; })) continue;
    std::for_each(begin, end, [](Fiber& f) { f.state = State::ready; });
    any = true;
  }
  return any;
}

bool Turns::release_launch() {
  const auto here = [](const Fiber& f) { return f.state == State::at_launch_before; };
  if (std::none_of(fibers_.begin(), fibers_.end(), here)) return false;
  if (launch_before_) {
    launch_before_();
    launch_before_ = nullptr;
    turns = this;
    grid_size.x = launch_.blocks;
    block_size.x = launch_.threads;
  }
  for (Fiber& f : fibers_) {
    if (here(f)) f.state = State::ready;
  }
  return true;
}

void Turns::run() {
  turns = this;
  grid_size.x = launch_.blocks;
  block_size.x = launch_.threads;
  std::vector<std::size_t> sequence(fibers_.size());
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == 1) std::reverse(sequence.begin(), sequence.end());
  std::mt19937 random(static_cast<unsigned>(order));
  for (;;) {
    if (order > 1) std::shuffle(sequence.begin(), sequence.end(), random);
    bool moved = false;
    for (const std::size_t i : sequence) {
      Fiber& f = fibers_[i];
      if (f.state != State::ready && f.state != State::spinning) continue;
      resume(f);
      if (!problem.empty()) throw std::runtime_error(problem);
      moved = moved || f.state != State::spinning;
    }
    if (std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.state == State::done; })) break;
    const bool warps = release_warps(), blocks = release_blocks();
    if (warps || blocks || moved || release_launch()) continue;
    throw std::runtime_error("threads of one block wait at different barriers or shuffles, or blocks for each other");
  }
  if (launch_before_) launch_before_();
  for (const auto& memory : shared) {
    const auto canary = memory.end() - CANARY_BYTES;
    if (!std::all_of(canary, memory.end(), [](unsigned char byte) { return byte == POISON; })) {
      throw std::runtime_error("a block wrote behind its shared memory");
    }
  }
}

void run(const Launch& launch, const std::function<void()>& launch_before) {
  if (launch.cooperative || launch_before) return Turns(launch, 0, launch.blocks, launch_before).run();
  const unsigned first = last_blocks != 0 && launch.blocks > last_blocks ? launch.blocks - last_blocks : 0;
  for (unsigned block = first; block < launch.blocks; ++block) Turns(launch, block, 1, nullptr).run();
}

std::unique_ptr<Launch> pending;

}  // namespace

void block_barrier() { turns->wait(State::at_barrier); }
void spin() { turns->wait(State::spinning); }

void warp_meets(WarpOperation operation, void* arguments) {
  turns->fiber->operation = operation;
  turns->fiber->arguments = arguments;
  turns->wait(State::at_warp);
}

void wait_for_the_launch_before() {
  if (turns->waits) turns->wait(State::at_launch_before);
}

unsigned char* shared_memory() { return turns->shared[turns->fiber->block - turns->first_block].data(); }

void require_shared(const void* address, std::size_t bytes) {
  const auto& memory = turns->shared[turns->fiber->block - turns->first_block];
  const auto* at = static_cast<const unsigned char*>(address);
  const bool inside = at >= memory.data() && at + bytes <= memory.data() + memory.size() - CANARY_BYTES;
  if (!inside || static_cast<std::size_t>(at - memory.data()) % bytes != 0) {
    throw std::runtime_error("an access outside of shared memory, or one that is not aligned");
  }
}

void copy_16(void* shared, const void* from, bool there) {
  require_shared(shared, COPY_BYTES);
  if (there && reinterpret_cast<std::uintptr_t>(from) % COPY_BYTES != 0) {
    throw std::runtime_error("an asynchronous copy from an address that is not on 16 bytes");
  }
  Copy copy{shared, {}};
  if (there) std::memcpy(copy.data, from, COPY_BYTES);
  if (late_copies) {
    turns->fiber->open.push_back(copy);
  } else {
    std::memcpy(shared, copy.data, COPY_BYTES);
  }
}

void copies_commit() {
  Fiber& f = *turns->fiber;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void copies_wait(int pending_groups) {
  auto& groups = turns->fiber->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.data, COPY_BYTES);
    groups.pop_front();
  }
}

void enqueue(const Launch& launch) {
  ++launches[launch.cooperative ? 2 : launch.programmatic ? 1 : 0];
  if (launch.programmatic && pending) {
    const std::unique_ptr<Launch> before = std::move(pending);
    return run(launch, [&] { run(*before, nullptr); });
  }
  flush();
  pending = std::make_unique<Launch>(launch);
}

void flush() {
  if (const std::unique_ptr<Launch> last = std::move(pending)) run(*last, nullptr);
}

}  // namespace emulator

// For tests/ops/test_cuda_emulated.py.
extern "C" void emulator_set_order(int order) { emulator::order = order; }
extern "C" void emulator_set_late_copies(int late) { emulator::late_copies = late != 0; }
extern "C" void emulator_set_last_blocks(int count) { emulator::last_blocks = static_cast<unsigned>(count); }
// The number of a device like this, which is the current one from now on.
extern "C" int emulator_set_machine(int multiprocessors, int block_shared, int shared, int capability) {
  const emulator::Machine wanted = {multiprocessors, block_shared, shared, capability};
  auto& devices = emulator::devices;
  const auto same = [&](const emulator::Machine& m) {
    return m.multiprocessors == wanted.multiprocessors && m.block_shared_bytes == wanted.block_shared_bytes &&
           m.multiprocessor_shared_bytes == wanted.multiprocessor_shared_bytes && m.capability == wanted.capability;
  };
  const auto found = std::find_if(devices.begin(), devices.end(), same);
  emulator::device = static_cast<int>(found - devices.begin());
  if (found == devices.end()) devices.push_back(wanted);
  return emulator::device;
}
// How many questions the host code has put to the runtime since the last call of this.
extern "C" int emulator_take_questions() {
  const int count = emulator::questions;
  emulator::questions = 0;
  return count;
}
extern "C" int emulator_take_launches(int kind) {
  const int count = emulator::launches[kind];
  emulator::launches[kind] = 0;
  return count;
}
