// The two products: checks arguments and runs the phases on a team of threads.
#include <algorithm>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

#include "diagonal.h"
#include "select.h"
#include "svf_cpu.h"
#include "threads.h"

namespace t2::cpu {
namespace {

// Scratch memory of the calling thread, kept between calls: decode must not pay for fresh pages every time.
class Scratch {
 public:
  char* reserve(std::size_t bytes) {
    if (bytes > size_) {
      free_now();
      data_ = static_cast<char*>(::operator new(bytes, std::align_val_t(4096)));
      size_ = bytes;
    }
    return data_;
  }
  ~Scratch() { free_now(); }

 private:
  void free_now() {
    if (data_) ::operator delete(data_, std::align_val_t(4096));
    data_ = nullptr;
    size_ = 0;
  }
  char* data_ = nullptr;
  std::size_t size_ = 0;
};
thread_local Scratch scratch;

std::size_t padded(std::int64_t bytes) { return static_cast<std::size_t>((bytes + 127) / 128 * 128); }

// Tokens per pass over the weights: a block of activations is read again for every panel of weight rows, so it should
// stay in a share of the last-level cache.
constexpr std::int64_t kActivationBytes = 4 * 1024 * 1024;

std::int64_t tokens_per_pass(const Kernel& k, std::int64_t width, std::int64_t T) {
  std::int64_t tokens = kActivationBytes / std::max<std::int64_t>(1, width * k.act_bytes);
  tokens = std::max<std::int64_t>(tokens, 16);
  return std::min(T, std::max<std::int64_t>(1, tokens / k.token_tile) * k.token_tile);
}

// A second product: y = act[:, column : column + k] weight^T + bias.
struct Second {
  const char* weight;  // (m, k)
  const void* bias;
  char* y;  // (T, m)
  std::int64_t m, k, column;
};

struct Job {
  const Kernel* kernel;
  const char* x;
  std::int64_t x_stride, x_bytes, w_bytes;
  const char* V;  // null: no first product, the second one reads x
  std::vector<Second> second;
  char* h;
  std::int64_t T, n, r;
  std::int64_t block;      // tokens per pass
  char *packed, *hidden;   // scratch
  std::int64_t packed_stride, hidden_stride;
  Diagonal diagonal;
};

Range rows_of(const Second& second, const Job& job, const Member& me) {
  return share(second.m, job.kernel->row_unit, me.index, me.size);
}

// The weights that a thread reads first in a second product, or null.
const char* first_weights(const Second& second, const Job& job, const Member& me) {
  const Range rows = rows_of(second, job, me);
  return rows.begin < rows.end ? second.weight + rows.begin * second.k * job.w_bytes : nullptr;
}

// Every member runs this. Per block of tokens: pack x (if the kernel wants another type), first product, second
// products, with a barrier between.
void run_job(const Member& me, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  const Kernel& k = *job.kernel;
  const Range hidden_rows = share(job.r, k.row_unit, me.index, me.size);
  for (std::int64_t t = 0; t < job.T; t += job.block) {
    const std::int64_t tokens = std::min(job.block, job.T - t);
    if (t > 0) me.sync();
    Product p{};
    const char* act = job.x + t * job.x_stride * job.x_bytes;
    p.act_stride = job.x_stride;
    p.T = tokens;
    if (job.packed) {
      for (std::int64_t row = 0; row < tokens; ++row) {
        const Range part = share(job.n, 64, me.index, me.size);
        k.pack(job.x + ((t + row) * job.x_stride + part.begin) * job.x_bytes,
               job.packed + (row * job.packed_stride + part.begin) * k.act_bytes, part.end - part.begin);
      }
      act = job.packed;
      p.act_stride = job.packed_stride;
      me.sync();
    }
    if (job.V) {
      p.act = act;
      p.weight = job.V;
      p.k = job.n;
      p.rows = job.r;
      p.h_out = job.h ? job.h + t * job.r * job.x_bytes : nullptr;
      p.out_act = job.hidden;
      p.out_act_stride = job.hidden_stride;
      p.diagonal = job.diagonal;
      if (p.diagonal.rows) p.diagonal.rows += t;
      p.next = first_weights(job.second.front(), job, me);
      k.hidden(p, hidden_rows.begin, hidden_rows.end);
      me.sync();
      act = job.hidden;
      p.act_stride = job.hidden_stride;
    }
    for (std::size_t i = 0; i < job.second.size(); ++i) {
      const Second& second = job.second[i];
      const Range rows = rows_of(second, job, me);
      p.act = act + second.column * k.act_bytes;
      p.weight = second.weight;
      p.k = second.k;
      p.rows = second.m;
      p.bias = second.bias;
      p.y = second.y + t * second.m * job.x_bytes;
      p.next = i + 1 < job.second.size() ? first_weights(job.second[i + 1], job, me) : nullptr;
      k.output(p, rows.begin, rows.end);
    }
  }
}

void start_job(Job& job, int n_threads) {
  const Kernel& k = *job.kernel;
  job.block = tokens_per_pass(k, std::max(job.n, job.r), job.T);
  job.packed_stride = (job.n + 63) / 64 * 64;
  job.hidden_stride = (job.r + 63) / 64 * 64;
  const std::size_t packed = k.x_is_act ? 0 : padded(job.block * job.packed_stride * k.act_bytes);
  const std::size_t hidden = padded(job.block * job.hidden_stride * k.act_bytes);
  char* memory = scratch.reserve(packed + hidden);
  job.packed = k.x_is_act ? nullptr : memory;
  job.hidden = memory + packed;
  std::int64_t weights = job.n * job.r;
  for (const Second& second : job.second) weights += second.k * second.m;
  // More tokens are more work per byte of weights.
  const std::int64_t bytes = weights * job.w_bytes * std::max<std::int64_t>(1, job.T / 8);
  run_team(useful_threads(n_threads, bytes), run_job, &job);
}

// A job without its second products. Checks what all jobs have in common.
Job job_over(Address x, std::int64_t x_stride, std::int64_t T, std::int64_t n, int x_dtype, int w_dtype, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("x_dtype", x_dtype);
  if (w_dtype != x_dtype && !is_eight_bit(w_dtype)) {
    refuse("w_dtype must equal x_dtype or be 3 (int8) or 4 (fp8), got " + std::to_string(w_dtype) + " with x_dtype " +
           std::to_string(x_dtype));
  }
  check_size("T", T, 0);
  check_size("n", n, 1);
  Job job{};
  job.kernel = (w_dtype == kI8 ? functions.int8 : w_dtype == kF8 ? functions.fp8 : functions.same) + x_dtype;
  job.x = pointer<const char>(x);
  job.x_stride = x_stride;
  job.x_bytes = bytes_of(x_dtype);
  job.w_bytes = bytes_of(w_dtype);
  job.T = T;
  job.n = n;
  return job;
}

// The next second product; reads the columns after those of the one before.
void add_second(Job& job, Address weight, Address bias, Address y, std::int64_t k, std::int64_t m) {
  check_size("m", m, 1);
  const std::int64_t column = job.second.empty() ? 0 : job.second.back().column + job.second.back().k;
  job.second.push_back({pointer<const char>(weight), pointer<const void>(bias), pointer<char>(y), m, k, column});
}

}  // namespace

std::string thread_runtime() { return team_runtime(); }

void svf_forward(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                 std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                 std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m, int x_dtype, int w_dtype,
                 int n_threads, int isa) {
  Job job = job_over(x, x_stride, T, n, x_dtype, w_dtype, isa);
  check_size("r", r, 1);
  add_second(job, U, bias, y, r, m);
  if (T == 0) return;
  const DiagonalRows diagonal(d, d_stride, slots, slot, base, scale, T, r);
  job.V = pointer<const char>(V);
  job.h = pointer<char>(h);
  job.r = r;
  job.diagonal = diagonal.view;
  start_job(job, n_threads);
}

void svf_group(Address x, std::int64_t x_stride, const std::vector<Address>& U, Address V, Address d,
               std::int64_t d_stride, std::int64_t slots, Address slot, Address base, const std::vector<Address>& bias,
               Address scale, const std::vector<Address>& y, std::int64_t T, std::int64_t n,
               const std::vector<std::int64_t>& r, const std::vector<std::int64_t>& m, int x_dtype, int w_dtype,
               int n_threads, int isa) {
  Job job = job_over(x, x_stride, T, n, x_dtype, w_dtype, isa);
  const std::size_t members = U.size();
  if (members == 0 || bias.size() != members || y.size() != members || r.size() != members || m.size() != members) {
    refuse("U, bias, y, r and m must have one entry for each member of the group, and at least one");
  }
  for (std::size_t i = 0; i < members; ++i) {
    check_size("r", r[i], 1);
    add_second(job, U[i], bias[i], y[i], r[i], m[i]);
    job.r += r[i];
  }
  if (T == 0) return;
  const DiagonalRows diagonal(d, d_stride, slots, slot, base, scale, T, job.r);
  job.V = pointer<const char>(V);
  job.diagonal = diagonal.view;
  start_job(job, n_threads);
}

void linear(Address x, std::int64_t x_stride, Address W, Address bias, Address y, std::int64_t T, std::int64_t n,
            std::int64_t m, int x_dtype, int w_dtype, int n_threads, int isa) {
  if (w_dtype != x_dtype) refuse("w_dtype must equal x_dtype = " + std::to_string(x_dtype) + ", got " + std::to_string(w_dtype));
  Job job = job_over(x, x_stride, T, n, x_dtype, w_dtype, isa);
  add_second(job, W, bias, y, n, m);
  if (T > 0) start_job(job, n_threads);
}

}  // namespace t2::cpu
