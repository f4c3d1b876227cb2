// A team of threads borrowed from the OpenMP runtime that is already in the process.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace t2::cpu {

// All members wait for each other; reusable. Spins first (the phases between two barriers take microseconds),
// then yields, so that an oversubscribed machine still makes progress.
class Barrier {
 public:
  void wait(int size);  // `size` members take part

 private:
  std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

struct Member {
  int index;         // 0 ... size - 1
  int size;          // threads really running; may be fewer than asked for
  Barrier* barrier;

  void sync() const { barrier->wait(size); }
};

using TeamFunction = void (*)(const Member& member, void* context);

// Runs f on up to n_threads threads, the caller among them, and returns when all are done.
void run_team(int n_threads, TeamFunction f, void* context);

// The runtime in use, for people: "libgomp (path)", "std::thread".
std::string team_runtime();

// Contiguous share of `count` items in units of `unit`, for member `index` of `size`.
struct Range {
  std::int64_t begin, end;
};
inline Range share(std::int64_t count, std::int64_t unit, int index, int size) {
  const std::int64_t units = (count + unit - 1) / unit;
  const std::int64_t begin = units * index / size * unit;
  const std::int64_t end = units * (index + 1) / size * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace t2::cpu
