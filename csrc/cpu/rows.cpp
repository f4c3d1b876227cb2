// Element-wise passes over rows, and the probe of the memory's speed.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "diagonal.h"
#include "select.h"
#include "svf_cpu.h"
#include "threads.h"

namespace t2::cpu {
namespace {

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
  // Without slots there is one sum; no tokens at all is an empty slot vector, whose address is 0 too.
  check_size("slots", slots, slot || T == 0 ? 0 : 1);
  const bool need_sum = dd && h;
  const bool need_product = d != 0;
  float* const sums = pointer<float>(dd);
  if (sums) std::fill(sums, sums + slots * r, 0.0f);
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

void dequantise(Address q, int q_dtype, Address scale, int scale_axis, Address out, std::int64_t rows,
                std::int64_t cols, int dtype, int n_threads, int isa) {
  const KernelTable& functions = table(isa);
  check_dtype("dtype", dtype);
  if (!is_eight_bit(q_dtype)) refuse("q_dtype must be 3 (int8) or 4 (fp8), got " + std::to_string(q_dtype));
  check_size("rows", rows, 0);
  check_size("cols", cols, 0);
  if (scale_axis != 0 && scale_axis != 1) refuse("scale_axis must be 0 (rows) or 1 (columns), got " + std::to_string(scale_axis));
  if (rows == 0 || cols == 0) return;
  const RowKernels& kernels = functions.rows[dtype];
  const auto dequantise_row = q_dtype == kI8 ? kernels.dequantise_int8 : kernels.dequantise_fp8;
  const std::int64_t size = bytes_of(dtype);
  const float* const factors = pointer<const float>(scale);
  parallel_share(useful_threads(n_threads, rows * cols), rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      dequantise_row(pointer<const char>(q) + i * cols, factors && scale_axis == 0 ? factors[i] : 1.0f,
                     factors && scale_axis == 1 ? factors : nullptr, pointer<char>(out) + i * cols * size, cols);
    }
  });
}

double read_bandwidth(Address data, std::int64_t bytes, int n_threads) {
  check_size("bytes", bytes, 1);
  const KernelTable& functions = table(kAuto);
  const char* const p = pointer<const char>(data);
  std::atomic<float> sink{0.0f};
  const auto start = std::chrono::steady_clock::now();
  parallel_share(n_threads, bytes, 4096, [&](std::int64_t begin, std::int64_t end) {
    sink.store(functions.read_stream(p + begin, end - begin), std::memory_order_relaxed);
  });
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return static_cast<double>(bytes) / took.count() * 1e-9;
}

}  // namespace t2::cpu
