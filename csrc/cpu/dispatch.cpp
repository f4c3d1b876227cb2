// Picks the instruction set, checks arguments, and runs the products' phases on a team of threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_table.h"
#include "svf_cpu.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#define T2_X86 1
#endif

namespace t2::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
constexpr int kIsas = 4;

#ifdef T2_X86
// __builtin_cpu_supports("avx512bf16") needs a newer compiler than the kernels do, so cpuid is read directly.
std::uint64_t extended_control_register() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

bool machine_has(int isa) {
  if (isa == kScalar) return true;
  std::uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !fma || !f16c) return false;
  const std::uint64_t saved = extended_control_register();
  if ((saved & 0x6) != 0x6) return false;
  std::uint32_t b7, c7;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return false;
  if (isa == kAvx2) return b7 >> 5 & 1;
  const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
  if ((saved & 0xe6) != 0xe6 || !f || !dq || !bw || !vl) return false;
  if (isa == kAvx512) return true;
  const bool vbmi = c7 >> 1 & 1;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return vbmi && (a >> 5 & 1);
}
#else
bool machine_has(int isa) { return isa == kScalar; }
#endif

const KernelTable* compiled_table(int isa) {
  switch (isa) {
    case kScalar:
      return scalar_table();
    case kAvx2:
      return avx2_table();
    case kAvx512:
      return avx512_table();
    default:
      return avx512bf16_table();
  }
}

struct Tables {
  const KernelTable* usable[kIsas];
  int best;

  Tables() : usable{}, best(kScalar) {
    for (int i = 0; i < kIsas; ++i) {
      usable[i] = machine_has(i) ? compiled_table(i) : nullptr;
      if (usable[i]) best = i;
    }
  }
};

const Tables& tables() {
  static const Tables t;
  return t;
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string usable_names() {
  std::string names;
  for (int i = kIsas - 1; i >= 0; --i) {
    if (!tables().usable[i]) continue;
    if (!names.empty()) names += ", ";
    names += kNames[i];
  }
  return names;
}

int from_environment() {
  const char* name = std::getenv("T2_CPU_ISA");
  return name && *name ? isa_code(name) : static_cast<int>(kAuto);
}

const KernelTable& table(int isa) {
  if (isa == kAuto) {
    static const int wished = from_environment();
    isa = wished == kAuto ? tables().best : wished;
  }
  if (isa < 0 || isa >= kIsas) refuse("isa must be -1 (auto) or 0 to 3, got " + std::to_string(isa));
  const KernelTable* t = tables().usable[isa];
  if (!t) {
    refuse(std::string("isa: this machine or build cannot run \"") + kNames[isa] + "\"; it can run " + usable_names() +
           ". Change T2_CPU_ISA or leave it unset.");
  }
  return *t;
}

void check_size(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least) refuse(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}
void check_dtype(const char* name, int dtype) {
  if (dtype < kF32 || dtype > kF16) {
    refuse(std::string(name) + " must be 0 (fp32), 1 (bf16) or 2 (fp16), got " + std::to_string(dtype));
  }
}
std::int64_t bytes_of(int dtype) { return dtype == kF32 ? 4 : dtype == kI8 ? 1 : 2; }

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}
template <class T>
const char* at(T* p, std::int64_t elements, std::int64_t size) {
  return reinterpret_cast<const char*>(p) + elements * size;
}

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
        refuse("slot[" + std::to_string(t) + "] must lie in [-1, " + std::to_string(slots) + "), got " +
               std::to_string(s[t]) + ". Does d hold a row for this expert?");
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

// Below this many bytes of weights a second thread costs more than it brings: waking it takes about 2 us, in which
// one core reads about 60 kB (2 cores of EPYC Zen 5).
constexpr std::int64_t kBytesPerThread = 32 * 1024;

int useful_threads(int n_threads, std::int64_t bytes) {
  const std::int64_t most = std::max<std::int64_t>(1, bytes / kBytesPerThread);
  return static_cast<int>(std::min<std::int64_t>(std::max(1, n_threads), most));
}

// Tokens per pass over the weights: as many as keep a block of activations inside half of a 1 MiB second-level cache.
constexpr std::int64_t kActivationBytes = 512 * 1024;

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

template <class F>
struct Columns {
  F f;
  std::int64_t count, unit;
};

// f(begin, end) over contiguous shares of `count` in units of `unit`.
template <class F>
void parallel_share(int n_threads, std::int64_t count, std::int64_t unit, F f) {
  Columns<F> work{f, count, unit};
  run_team(
      n_threads,
      [](const Member& me, void* context) {
        auto& w = *static_cast<Columns<F>*>(context);
        const Range part = share(w.count, w.unit, me.index, me.size);
        if (part.begin < part.end) w.f(part.begin, part.end);
      },
      &work);
}

}  // namespace

std::string isa_name(int isa) { return table(isa).name; }

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (int i = kIsas - 1; i >= 0; --i)
    if (tables().usable[i]) names.emplace_back(kNames[i]);
  return names;
}

int isa_code(const std::string& name) {
  if (name == "auto") return kAuto;
  for (int i = 0; i < kIsas; ++i)
    if (name == kNames[i]) return i;
  refuse("isa (or T2_CPU_ISA) must be one of auto, scalar, avx2, avx512, avx512bf16, got \"" + name + "\"");
}

std::string thread_runtime() { return team_runtime(); }

void svf_forward(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                 std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                 std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m, int x_dtype, int w_dtype,
                 int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("x_dtype", x_dtype);
  if (w_dtype != x_dtype && w_dtype != kI8) {
    refuse("w_dtype must equal x_dtype or be 3 (int8), got " + std::to_string(w_dtype) + " with x_dtype " +
           std::to_string(x_dtype));
  }
  check_size("T", T, 0);
  check_size("n", n, 1);
  check_size("r", r, 1);
  check_size("m", m, 1);
  if (T == 0) return;
  const DiagonalRows diagonal(d, d_stride, slots, slot, base, scale, T, r);
  Job job{};
  job.kernel = w_dtype == kI8 ? &functions.int8[x_dtype] : &functions.same[x_dtype];
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

void scale_rows(Address h, std::int64_t h_stride, Address out, std::int64_t out_stride, Address d,
                std::int64_t d_stride, std::int64_t slots, Address slot, Address base, Address scale, std::int64_t T,
                std::int64_t r, int dtype, int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("dtype", dtype);
  check_size("T", T, 0);
  check_size("r", r, 1);
  if (T == 0) return;
  const DiagonalRows diagonal(d, d_stride, slots, slot, base, scale, T, r);
  const RowKernels& rows = functions.rows[dtype];
  const std::int64_t size = bytes_of(dtype);
  parallel_share(useful_threads(n_threads, T * r * size), T, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      rows.scale_row(pointer<const char>(h) + t * h_stride * size, pointer<char>(out) + t * out_stride * size,
                     diagonal.view.row(t), diagonal.view.scale, r);
    }
  });
}

void backward_rows(Address gu, std::int64_t gu_stride, Address h, std::int64_t h_stride, Address d,
                   std::int64_t d_stride, std::int64_t slots, Address slot, Address base, Address scale, Address dd,
                   std::int64_t T, std::int64_t r, int dtype, int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("dtype", dtype);
  check_size("T", T, 0);
  check_size("r", r, 1);
  check_size("slots", slots, slot ? 0 : 1);
  const bool need_sum = dd && h;
  const bool need_product = d != 0;
  float* const sums = pointer<float>(dd);
  if (need_sum) std::fill(sums, sums + (slot ? slots : 1) * r, 0.0f);
  if (T == 0 || (!need_sum && !need_product)) return;
  const DiagonalRows diagonal(d, d_stride, slots, slot, base, scale, T, r);
  const std::int32_t* const s = pointer<const std::int32_t>(slot);
  const RowKernels& rows = functions.rows[dtype];
  const std::int64_t size = bytes_of(dtype);
  // Threads split the columns, so each sum belongs to one thread and its order is that of the tokens. Runs of equal
  // slots are summed on their own first, at most kRun tokens each: shorter chains, smaller rounding error.
  constexpr std::int64_t kColumns = 1024, kRun = 64;
  parallel_share(useful_threads(n_threads, T * r * size), r, 64, [&](std::int64_t begin, std::int64_t end) {
    float partial[kColumns];
    for (std::int64_t c = begin; c < end; c += kColumns) {
      const std::int64_t count = std::min(kColumns, end - c);
      for (std::int64_t t = 0; t < T;) {
        const std::int32_t group = s ? s[t] : 0;
        std::int64_t stop = t + 1;
        while (stop < T && stop - t < kRun && (!s || s[stop] == group)) ++stop;
        const bool summed = need_sum && group >= 0;
        if (summed) std::fill(partial, partial + count, 0.0f);
        for (; t < stop; ++t) {
          char* const g = pointer<char>(gu) + (t * gu_stride + c) * size;
          if (summed) rows.accumulate(g, pointer<const char>(h) + (t * h_stride + c) * size, partial, count);
          if (need_product) {
            rows.scale_row(g, g, diagonal.view.row(t) + c, scale ? diagonal.view.scale + c : nullptr, count);
          }
        }
        if (summed) {
          float* const total = sums + group * r + c;
          if (scale) {
            for (std::int64_t i = 0; i < count; ++i) total[i] += partial[i] * diagonal.view.scale[c + i];
          } else {
            for (std::int64_t i = 0; i < count; ++i) total[i] += partial[i];
          }
        }
      }
    }
  });
}

void dequantise(Address q, Address scale, int scale_axis, Address out, std::int64_t rows, std::int64_t cols, int dtype,
                int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("dtype", dtype);
  check_size("rows", rows, 0);
  check_size("cols", cols, 0);
  if (scale_axis != 0 && scale_axis != 1) refuse("scale_axis must be 0 (rows) or 1 (columns), got " + std::to_string(scale_axis));
  if (rows == 0 || cols == 0) return;
  const RowKernels& kernels = functions.rows[dtype];
  const std::int64_t size = bytes_of(dtype);
  const float* const factors = pointer<const float>(scale);
  parallel_share(useful_threads(n_threads, rows * cols), rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      kernels.dequantise_row(pointer<const std::int8_t>(q) + i * cols, factors && scale_axis == 0 ? factors[i] : 1.0f,
                             factors && scale_axis == 1 ? factors : nullptr,
                             pointer<char>(out) + i * cols * size, cols);
    }
  });
}

double read_bandwidth(std::int64_t bytes, int repeats, int n_threads) {
  check_size("bytes", bytes, 4096);
  check_size("repeats", repeats, 1);
  const KernelTable& functions = table(kAuto);
  // Plain pages, as torch's allocator gives them: the number is a ceiling for what a kernel can reach on weights.
  const std::size_t count = static_cast<std::size_t>(bytes / 4);
  std::unique_ptr<float[]> buffer(new float[count]);
  parallel_share(n_threads, static_cast<std::int64_t>(count), 1024, [&](std::int64_t begin, std::int64_t end) {
    std::fill(buffer.get() + begin, buffer.get() + end, 1.0f);
  });
  std::atomic<float> sink{0.0f};
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    parallel_share(n_threads, static_cast<std::int64_t>(count), 1024, [&](std::int64_t begin, std::int64_t end) {
      sink.store(functions.read_stream(buffer.get() + begin, (end - begin) * 4), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  return static_cast<double>(count) * 4 / best * 1e-9;
}

}  // namespace t2::cpu
