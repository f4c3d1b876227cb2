// The kernel, written once over a policy P (an instruction set and a kind of weight) and compiled by every
// isa_*.cpp with its own flags. All of it has internal linkage, see convert.h.
//
// out[t][j] = sum_i act[t][i] weight[j][i]: rows of the weight are dotted with rows of the activations. One vector
// accumulator per (row, token) runs over i from start to end, and its lanes are folded in one fixed tree. So the
// order of the sum, and with it every bit, is the same in whatever tile the pair lands: batch invariance costs
// nothing. Latency is hidden by the other pairs of the tile (at least 8).
//
// The policy provides
//   Weight, Act, X          element types in memory (X: of x, y, h and bias)
//   Acc, WReg, AReg         vector registers
//   kStep                   elements per load
//   kTokens                 tokens in a tile of 4 rows that fit the register file
//   zero, load_w, load_w_tail, load_a, load_a_tail, fma, sum4
#pragma once

#include "convert.h"
#include "kernel_table.h"

#if defined(__GNUC__) || defined(__clang__)
#define T2_INLINE inline __attribute__((always_inline))
#define T2_PREFETCH(address) __builtin_prefetch((address), 0, 3)
#else
#define T2_INLINE inline
#define T2_PREFETCH(address) ((void)0)
#endif

namespace t2::cpu {
namespace {

constexpr int kCacheLine = 64;

// sums[token][row] for ROWS weight rows and TOKENS tokens. PREFETCH: every line of the weight that is read also
// asks for the line `ahead` bytes further, which is where the next tile of rows begins.
template <class P, int ROWS, int TOKENS, bool PREFETCH>
void tile(const typename P::Weight* const* weight, const typename P::Act* act, std::int64_t act_stride,
          std::int64_t k, std::int64_t ahead, float* sums) {
  using Weight = typename P::Weight;
  constexpr int kSteps = kCacheLine / (P::kStep * static_cast<int>(sizeof(Weight)));
  constexpr int kUnroll = kSteps < 1 ? 1 : kSteps;
  const Weight* w[ROWS];
  for (int j = 0; j < ROWS; ++j) w[j] = weight[j];
  typename P::Acc acc[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < ROWS; ++j) acc[t][j] = P::zero();

  const auto step = [&](std::int64_t i) {
    typename P::WReg wr[ROWS];
    for (int j = 0; j < ROWS; ++j) wr[j] = P::load_w(w[j] + i);
    for (int t = 0; t < TOKENS; ++t) {
      const typename P::AReg ar = P::load_a(act + t * act_stride + i);
      for (int j = 0; j < ROWS; ++j) acc[t][j] = P::fma(acc[t][j], wr[j], ar);
    }
  };
  std::int64_t i = 0;
  for (; i + kUnroll * P::kStep <= k; i += kUnroll * P::kStep) {
    if (PREFETCH)
      for (int j = 0; j < ROWS; ++j) T2_PREFETCH(reinterpret_cast<const char*>(w[j] + i) + ahead);
    for (int u = 0; u < kUnroll; ++u) step(i + u * P::kStep);
  }
  for (; i + P::kStep <= k; i += P::kStep) step(i);
  if (i < k) {
    const int rest = static_cast<int>(k - i);
    typename P::WReg wr[ROWS];
    for (int j = 0; j < ROWS; ++j) wr[j] = P::load_w_tail(w[j] + i, rest);
    for (int t = 0; t < TOKENS; ++t) {
      const typename P::AReg ar = P::load_a_tail(act + t * act_stride + i, rest);
      for (int j = 0; j < ROWS; ++j) acc[t][j] = P::fma(acc[t][j], wr[j], ar);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < ROWS; j += 4)
      P::sum4(acc[t][j], acc[t][j + 1], acc[t][j + 2], acc[t][j + 3], sums + t * ROWS + j);
}

template <class P, int ROWS, bool PREFETCH>
T2_INLINE void tile_of(int tokens, const typename P::Weight* const* weight, const typename P::Act* act,
                       std::int64_t act_stride, std::int64_t k, std::int64_t ahead, float* sums) {
  switch (tokens) {
    case 1:
      return tile<P, ROWS, 1, PREFETCH>(weight, act, act_stride, k, ahead, sums);
    case 2:
      if constexpr (P::kTokens * 4 >= 2 * ROWS)
        return tile<P, ROWS, 2, PREFETCH>(weight, act, act_stride, k, ahead, sums);
      break;
    case 3:
      if constexpr (P::kTokens * 4 >= 3 * ROWS)
        return tile<P, ROWS, 3, PREFETCH>(weight, act, act_stride, k, ahead, sums);
      break;
    case 4:
      if constexpr (P::kTokens * 4 >= 4 * ROWS)
        return tile<P, ROWS, 4, PREFETCH>(weight, act, act_stride, k, ahead, sums);
      break;
    case 5:
      if constexpr (P::kTokens * 4 >= 5 * ROWS)
        return tile<P, ROWS, 5, PREFETCH>(weight, act, act_stride, k, ahead, sums);
      break;
    default:
      if constexpr (P::kTokens * 4 >= 6 * ROWS)
        return tile<P, ROWS, 6, PREFETCH>(weight, act, act_stride, k, ahead, sums);
      break;
  }
}

// One tile's sums to h and to the activations of the second product.
template <class P>
struct Hidden {
  static T2_INLINE void store(const Product& p, std::int64_t t, std::int64_t j, int rows, const float* sums) {
    using X = typename P::X;
    using Act = typename P::Act;
    if (p.h_out) {
      X* h = static_cast<X*>(p.h_out) + t * p.rows + j;
      for (int i = 0; i < rows; ++i) h[i] = from_float<X>(sums[i]);
    }
    Act* out = static_cast<Act*>(p.out_act) + t * p.out_act_stride + j;
    const float* d = p.diagonal.row(t) + j;
    if (p.diagonal.scale) {
      const float* scale = p.diagonal.scale + j;
      for (int i = 0; i < rows; ++i) out[i] = from_float<Act>(sums[i] * (d[i] * scale[i]));
    } else {
      for (int i = 0; i < rows; ++i) out[i] = from_float<Act>(sums[i] * d[i]);
    }
  }
};

template <class P>
struct Output {
  static T2_INLINE void store(const Product& p, std::int64_t t, std::int64_t j, int rows, const float* sums) {
    using X = typename P::X;
    X* y = static_cast<X*>(p.y) + t * p.rows + j;
    if (p.bias) {
      const X* bias = static_cast<const X*>(p.bias) + j;
      for (int i = 0; i < rows; ++i) y[i] = from_float<X>(sums[i] + to_float(bias[i]));
    } else {
      for (int i = 0; i < rows; ++i) y[i] = from_float<X>(sums[i]);
    }
  }
};

template <class P, template <class> class Store, int ROWS>
void sweep(const Product& p, std::int64_t row_begin, std::int64_t row_end) {
  using Weight = typename P::Weight;
  using Act = typename P::Act;
  constexpr int kTile = P::kTokens * 4 / ROWS;
  const Weight* const base = static_cast<const Weight*>(p.weight);
  const Act* const act = static_cast<const Act*>(p.act);
  const std::int64_t tiles = (p.T + kTile - 1) / kTile;
  alignas(kCacheLine) float sums[kTile * ROWS];
  for (std::int64_t j = row_begin; j < row_end; j += ROWS) {
    const int rows = static_cast<int>(row_end - j < ROWS ? row_end - j : ROWS);
    // Rows past the end repeat the last one, so nothing outside the matrix is read; their sums are dropped.
    const Weight* w[ROWS];
    for (int i = 0; i < ROWS; ++i) w[i] = base + (j + (i < rows ? i : rows - 1)) * p.k;
    const char* const next = j + ROWS < row_end ? reinterpret_cast<const char*>(base + (j + ROWS) * p.k)
                                                : static_cast<const char*>(p.next);
    const std::int64_t ahead = next ? next - reinterpret_cast<const char*>(w[0]) : 0;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const std::int64_t t = p.T * i / tiles;
      const int tokens = static_cast<int>(p.T * (i + 1) / tiles - t);
      const Act* a = act + t * p.act_stride;
      if (i == 0 && next) {
        tile_of<P, ROWS, true>(tokens, w, a, p.act_stride, p.k, ahead, sums);
      } else {
        tile_of<P, ROWS, false>(tokens, w, a, p.act_stride, p.k, 0, sums);
      }
      for (int u = 0; u < tokens; ++u) Store<P>::store(p, t + u, j, rows, sums + u * ROWS);
    }
  }
}

// Few tokens take 8 rows at a time, for enough independent sums and enough open memory streams.
template <class P, template <class> class Store>
void product(const Product& p, std::int64_t row_begin, std::int64_t row_end) {
  if (p.T * 2 <= P::kTokens) {
    sweep<P, Store, 8>(p, row_begin, row_end);
  } else {
    sweep<P, Store, 4>(p, row_begin, row_end);
  }
}

template <class P>
void pack(const void* x, void* act, std::int64_t count) {
  const typename P::X* in = static_cast<const typename P::X*>(x);
  typename P::Act* out = static_cast<typename P::Act*>(act);
  for (std::int64_t i = 0; i < count; ++i) out[i] = from_float<typename P::Act>(to_float(in[i]));
}

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class P>
constexpr Kernel kernel() {
  return Kernel{static_cast<int>(sizeof(typename P::Act)),
                Same<typename P::Act, typename P::X>::value,
                8,
                P::kTokens,
                pack<P>,
                product<P, Hidden>,
                product<P, Output>};
}

// The element-wise passes are plain loops: the compiler vectorises them with the flags of the including file.
template <class X>
void scale_row(const void* in, void* out, const float* d, const float* scale, std::int64_t count) {
  const X* a = static_cast<const X*>(in);
  X* b = static_cast<X*>(out);
  if (scale) {
    for (std::int64_t i = 0; i < count; ++i) b[i] = from_float<X>(to_float(a[i]) * (d[i] * scale[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) b[i] = from_float<X>(to_float(a[i]) * d[i]);
  }
}

template <class X>
void accumulate(const void* gu, const void* h, float* sum, std::int64_t count) {
  const X* a = static_cast<const X*>(gu);
  const X* b = static_cast<const X*>(h);
  for (std::int64_t i = 0; i < count; ++i) sum[i] += to_float(a[i]) * to_float(b[i]);
}

template <class X>
void dequantise_row(const std::int8_t* q, float row_scale, const float* col_scale, void* out, std::int64_t count) {
  X* b = static_cast<X*>(out);
  if (col_scale) {
    for (std::int64_t i = 0; i < count; ++i) b[i] = from_float<X>(to_float(q[i]) * (row_scale * col_scale[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) b[i] = from_float<X>(to_float(q[i]) * row_scale);
  }
}

template <class X>
constexpr RowKernels row_kernels() {
  return RowKernels{scale_row<X>, accumulate<X>, dequantise_row<X>};
}

}  // namespace
}  // namespace t2::cpu
