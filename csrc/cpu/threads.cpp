// Finds the OpenMP runtime in the process (torch brings one) and borrows its thread pool.
//
// Linking an OpenMP library of our own would put a second pool beside torch's, and two pools that both spin
// between regions halve each other's speed. So the three entry points needed are looked up at run time. They are
// part of GNU libgomp's stable ABI, and LLVM's and Intel's runtimes export them too.
#include "threads.h"

#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__linux__)
#include <link.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace t2::cpu {
namespace {

struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string name = "std::thread";

  bool found() const { return parallel && thread_num && num_threads; }
};

#if defined(__linux__) || defined(__APPLE__)
bool take(Runtime& rt, void* handle, const char* name) {
  rt.parallel = reinterpret_cast<decltype(rt.parallel)>(dlsym(handle, "GOMP_parallel"));
  rt.thread_num = reinterpret_cast<decltype(rt.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  rt.num_threads = reinterpret_cast<decltype(rt.num_threads)>(dlsym(handle, "omp_get_num_threads"));
  if (!rt.found()) return false;
  Dl_info info;
  rt.name = name;
  if (dladdr(reinterpret_cast<void*>(rt.parallel), &info) && info.dli_fname) rt.name = info.dli_fname;
  return true;
}
#endif

#if defined(__linux__)
// A runtime loaded privately (RTLD_LOCAL) is not in the global scope, but it is in the list of loaded objects.
int visit_loaded(dl_phdr_info* info, std::size_t, void* data) {
  const char* path = info->dlpi_name;
  const char* slash = path ? std::strrchr(path, '/') : nullptr;
  const char* base = slash ? slash + 1 : path;
  if (!base) return 0;
  const bool openmp = !std::strncmp(base, "libgomp", 7) || !std::strncmp(base, "libiomp5", 8) ||
                      !std::strncmp(base, "libomp", 6);
  if (!openmp) return 0;
  void* handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  return handle && take(*static_cast<Runtime*>(data), handle, base) ? 1 : 0;
}
#endif

Runtime find_runtime() {
  Runtime rt;
#if defined(__linux__) || defined(__APPLE__)
  if (take(rt, RTLD_DEFAULT, "OpenMP")) return rt;
#endif
#if defined(__linux__)
  if (dl_iterate_phdr(visit_loaded, &rt)) return rt;
#endif
  return Runtime{};
}

// Looked up at first use, which is after `import torch` has loaded its runtime.
const Runtime& runtime() {
  static const Runtime rt = find_runtime();
  return rt;
}

void pause_cpu() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kMaxThreads = 256;

}  // namespace

void Barrier::wait(int size) {
  if (size == 1) return;
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  // About 50 us of spinning at 2-4 GHz; a partner later than that has lost its core.
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
    if (spins < 4000) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
}

void run_team(int n_threads, TeamFunction f, void* context) {
  if (n_threads > kMaxThreads) n_threads = kMaxThreads;
  if (n_threads <= 1) {
    Barrier barrier;
    f(Member{0, 1, &barrier}, context);
    return;
  }
  const Runtime& rt = runtime();
  if (rt.found()) {
    // The runtime may grant fewer threads (nested regions, thread limits), so a member learns the team's size
    // only inside; the barrier takes it per wait.
    struct Shared {
      TeamFunction f;
      void* context;
      const Runtime* rt;
      Barrier barrier;
    } shared{f, context, &rt, {}};
    rt.parallel(
        [](void* data) {
          Shared& s = *static_cast<Shared*>(data);
          s.f(Member{s.rt->thread_num(), s.rt->num_threads(), &s.barrier}, s.context);
        },
        &shared, static_cast<unsigned>(n_threads), 0u);
    return;
  }
  Barrier barrier;
  std::vector<std::thread> team;
  team.reserve(static_cast<std::size_t>(n_threads) - 1);
  for (int i = 1; i < n_threads; ++i) {
    team.emplace_back([=, &barrier] { f(Member{i, n_threads, &barrier}, context); });
  }
  f(Member{0, n_threads, &barrier}, context);
  for (std::thread& t : team) t.join();
}

std::string team_runtime() { return runtime().name; }

}  // namespace t2::cpu
