// The two products: checks arguments and runs the phases on a team of threads.
#include <algorithm>
#include <cstdint>
#include <new>
#include <string>

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

struct Job {
  const Kernel* kernel;
  const char* x;
  std::int64_t x_stride, x_bytes, w_bytes;
  const char *U, *V;  // U null: one product only
  const void* bias;
  char *y, *h;
  std::int64_t T, n, r, m;
  std::int64_t block;      // tokens per pass
  char *packed, *hidden;   // scratch
  std::int64_t packed_stride, hidden_stride;
  Diagonal diagonal;
};

// Every member runs this. Per block of tokens: pack x (if the kernel wants another type), first product, second
// product, with a barrier between.
void run_job(const Member& me, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  const Kernel& k = *job.kernel;
  const Range hidden_rows = share(job.r, k.row_unit, me.index, me.size);
  const Range output_rows = share(job.m, k.row_unit, me.index, me.size);
  for (std::int64_t t = 0; t < job.T; t += job.block) {
    const std::int64_t tokens = std::min(job.block, job.T - t);
    if (t > 0) me.sync();
    Product p{};
    p.act = job.x + t * job.x_stride * job.x_bytes;
    p.act_stride = job.x_stride;
    p.T = tokens;
    if (job.packed) {
      for (std::int64_t row = 0; row < tokens; ++row) {
        const Range part = share(job.n, 64, me.index, me.size);
        k.pack(job.x + ((t + row) * job.x_stride + part.begin) * job.x_bytes,
               job.packed + (row * job.packed_stride + part.begin) * k.act_bytes, part.end - part.begin);
      }
      p.act = job.packed;
      p.act_stride = job.packed_stride;
      me.sync();
    }
    if (job.U) {
      const char* const first_of_output = job.U + output_rows.begin * job.r * job.w_bytes;
      p.weight = job.V;
      p.k = job.n;
      p.rows = job.r;
      p.h_out = job.h ? job.h + t * job.r * job.x_bytes : nullptr;
      p.out_act = job.hidden;
      p.out_act_stride = job.hidden_stride;
      p.diagonal = job.diagonal;
      if (p.diagonal.rows) p.diagonal.rows += t;
      p.next = output_rows.begin < output_rows.end ? first_of_output : nullptr;
      k.hidden(p, hidden_rows.begin, hidden_rows.end);
      me.sync();
      p.act = job.hidden;
      p.act_stride = job.hidden_stride;
    }
    p.weight = job.U ? job.U : job.V;
    p.k = job.U ? job.r : job.n;
    p.rows = job.m;
    p.bias = job.bias;
    p.y = job.y + t * job.m * job.x_bytes;
    p.next = nullptr;
    k.output(p, output_rows.begin, output_rows.end);
  }
}

void start_job(Job& job, int n_threads) {
  const Kernel& k = *job.kernel;
  const std::int64_t width = job.U ? std::max(job.n, job.r) : job.n;
  job.block = tokens_per_pass(k, width, job.T);
  job.packed_stride = (job.n + 63) / 64 * 64;
  job.hidden_stride = (job.r + 63) / 64 * 64;
  const std::size_t packed = k.x_is_act ? 0 : padded(job.block * job.packed_stride * k.act_bytes);
  const std::size_t hidden = job.U ? padded(job.block * job.hidden_stride * k.act_bytes) : 0;
  char* memory = scratch.reserve(packed + hidden);
  job.packed = k.x_is_act ? nullptr : memory;
  job.hidden = memory + packed;
  const std::int64_t bytes = (job.n * (job.U ? job.r : job.m) + (job.U ? job.r * job.m : 0)) * job.w_bytes;
  // More tokens are more work per byte of weights.
  run_team(useful_threads(n_threads, bytes * std::max<std::int64_t>(1, job.T / 8)), run_job, &job);
}

}  // namespace

std::string thread_runtime() { return team_runtime(); }

void svf_forward(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                 std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                 std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m, int x_dtype, int w_dtype,
                 int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("x_dtype", x_dtype);
  if (w_dtype != x_dtype && !is_eight_bit(w_dtype)) {
    refuse("w_dtype must equal x_dtype or be 3 (int8) or 4 (fp8), got " + std::to_string(w_dtype) + " with x_dtype " +
           std::to_string(x_dtype));
  }
  check_size("T", T, 0);
  check_size("n", n, 1);
  check_size("r", r, 1);
  check_size("m", m, 1);
  if (T == 0) return;
  const DiagonalRows diagonal(d, d_stride, slots, slot, base, scale, T, r);
  Job job{};
  job.kernel = (w_dtype == kI8 ? functions.int8 : w_dtype == kF8 ? functions.fp8 : functions.same) + x_dtype;
  job.x = pointer<const char>(x);
  job.x_stride = x_stride;
  job.x_bytes = bytes_of(x_dtype);
  job.w_bytes = bytes_of(w_dtype);
  job.U = pointer<const char>(U);
  job.V = pointer<const char>(V);
  job.bias = pointer<const void>(bias);
  job.y = pointer<char>(y);
  job.h = pointer<char>(h);
  job.T = T;
  job.n = n;
  job.r = r;
  job.m = m;
  job.diagonal = diagonal.view;
  start_job(job, n_threads);
}

void linear(Address x, std::int64_t x_stride, Address W, Address bias, Address y, std::int64_t T, std::int64_t n,
            std::int64_t m, int x_dtype, int w_dtype, int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("x_dtype", x_dtype);
  if (w_dtype != x_dtype) refuse("w_dtype must equal x_dtype = " + std::to_string(x_dtype) + ", got " + std::to_string(w_dtype));
  check_size("T", T, 0);
  check_size("n", n, 1);
  check_size("m", m, 1);
  if (T == 0) return;
  Job job{};
  job.kernel = &functions.same[x_dtype];
  job.x = pointer<const char>(x);
  job.x_stride = x_stride;
  job.x_bytes = bytes_of(x_dtype);
  job.w_bytes = job.x_bytes;
  job.V = pointer<const char>(W);
  job.bias = pointer<const void>(bias);
  job.y = pointer<char>(y);
  job.T = T;
  job.n = n;
  job.m = m;
  start_job(job, n_threads);
}

}  // namespace t2::cpu
