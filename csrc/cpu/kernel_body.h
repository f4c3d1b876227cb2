// The kernel, written once over a policy P (an instruction set and a kind of weight) and compiled by every
// isa_*.cpp with its own flags. All of it has internal linkage, see convert.h.
//
// out[t][j] = sum_i act[t][i] weight[j][i]: rows of the weight are dotted with rows of the activations. One vector
// accumulator per (row, token) runs over i from start to end, and its lanes are folded in one fixed tree. So the
// order of the sum, and with it every bit, is the same in whatever tile the pair lands: batch invariance costs
// nothing. Latency is hidden by the other pairs of the tile (at least 4).
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
// A panel of rows that many tiles of tokens use should stay in the second-level cache.
constexpr std::int64_t kPanelBytes = 384 * 1024;
constexpr int kPanelTiles = 16;
// Activations of a tile, per token, that stay in the first-level cache beside the weights.
constexpr std::int64_t kChunkBytes = 2048;
// The least distance at which weights are asked for.
constexpr std::int64_t kLeadBytes = 16 * 1024;

// acc[token][row] += act[token][0:k] * weight[row][0:k]. With every line of its ROWS rows it asks for ROWS lines from
// `ahead` on, in the order of memory: the rows are read side by side, but what the memory sees is one stream, and its
// prefetcher follows one stream best.
template <class P, int ROWS, int TOKENS, bool AHEAD>
T2_INLINE void multiply(typename P::Acc (&acc)[TOKENS][ROWS], const typename P::Weight* const (&w)[ROWS],
                        const typename P::Act* act, std::int64_t act_stride, std::int64_t k, const char* ahead) {
  constexpr int kSteps = kCacheLine / (P::kStep * static_cast<int>(sizeof(typename P::Weight)));
  constexpr int kUnroll = kSteps < 1 ? 1 : kSteps;
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
    if (AHEAD) {
      for (int j = 0; j < ROWS; ++j) T2_PREFETCH(ahead + j * kCacheLine);
      ahead += ROWS * kCacheLine;
    }
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
}

// sums[token * 4 + row]: the lanes of every accumulator folded. A fourth row that is not there gives a copy of the third.
template <class P, int ROWS, int TOKENS>
T2_INLINE void fold_tile(typename P::Acc (&acc)[TOKENS][ROWS], float* sums) {
  static_assert(ROWS == 3 || ROWS == 4, "sum4 folds four");
  for (int t = 0; t < TOKENS; ++t) P::sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][ROWS - 1], sums + t * 4);
}

// A tile over one chunk of k: the accumulators rest in `carry` between chunks. Registers to memory and back keeps
// every bit, so the chunks change nothing in the result.
template <class P, int ROWS, int TOKENS>
void tile(const typename P::Weight* const (&weight)[ROWS], const typename P::Act* act, std::int64_t act_stride,
          std::int64_t k, const char* ahead, bool first, bool last, typename P::Acc* carry, float* sums) {
  const typename P::Weight* w[ROWS];
  for (int j = 0; j < ROWS; ++j) w[j] = weight[j];
  typename P::Acc acc[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; ++t)
    for (int j = 0; j < ROWS; ++j) acc[t][j] = first ? P::zero() : carry[t * ROWS + j];
  if (ahead) {
    multiply<P, ROWS, TOKENS, true>(acc, w, act, act_stride, k, ahead);
  } else {
    multiply<P, ROWS, TOKENS, false>(acc, w, act, act_stride, k, nullptr);
  }
  if (last) {
    fold_tile<P, ROWS, TOKENS>(acc, sums);
  } else {
    for (int t = 0; t < TOKENS; ++t)
      for (int j = 0; j < ROWS; ++j) carry[t * ROWS + j] = acc[t][j];
  }
}

template <int TOKENS>
struct Count {
  static constexpr int value = TOKENS;
};

// f(Count<tokens>) for 1 <= tokens <= MOST <= 8.
template <int MOST, class F>
T2_INLINE void with_count(int tokens, const F& f) {
  static_assert(MOST >= 1 && MOST <= 8, "add a case");
  switch (tokens) {
    case 1:
      return f(Count<1>{});
    case 2:
      if constexpr (MOST >= 2) return f(Count<2>{});
      break;
    case 3:
      if constexpr (MOST >= 3) return f(Count<3>{});
      break;
    case 4:
      if constexpr (MOST >= 4) return f(Count<4>{});
      break;
    case 5:
      if constexpr (MOST >= 5) return f(Count<5>{});
      break;
    case 6:
      if constexpr (MOST >= 6) return f(Count<6>{});
      break;
    case 7:
      if constexpr (MOST >= 7) return f(Count<7>{});
      break;
    default:
      if constexpr (MOST >= 8) return f(Count<8>{});
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

// The weight is read once, from its first byte to its last, a panel of rows at a time. A panel is used by one tile of
// tokens after another, in chunks of k so short that a tile's activations stay in the first-level cache; meanwhile the
// first tile of tokens asks for the next panel.
template <class P, template <class> class Store, int ROWS>
void sweep(const Product& p, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel, std::int64_t chunk) {
  using Weight = typename P::Weight;
  using Act = typename P::Act;
  constexpr int kTile = P::kTokens * 4 / ROWS;
  const Weight* const base = static_cast<const Weight*>(p.weight);
  const Act* const act = static_cast<const Act*>(p.act);
  const std::int64_t tiles = (p.T + kTile - 1) / kTile;
  const std::int64_t row_bytes = p.k * static_cast<std::int64_t>(sizeof(Weight));
  const std::int64_t lead = panel * row_bytes > kLeadBytes ? panel * row_bytes : kLeadBytes;
  alignas(kCacheLine) float sums[kTile * 4];
  alignas(kCacheLine) typename P::Acc carry[kPanelTiles][kTile * ROWS];
  const char* const end_of_rows = reinterpret_cast<const char*>(base + row_end * p.k);
  for (std::int64_t begin = row_begin; begin < row_end; begin += panel) {
    const std::int64_t end = begin + panel < row_end ? begin + panel : row_end;
    // Past the last row comes the first of the second product, across the barrier between.
    const char* ahead = reinterpret_cast<const char*>(base + begin * p.k) + lead;
    if (ahead >= end_of_rows) ahead = p.next ? static_cast<const char*>(p.next) + (ahead - end_of_rows) : nullptr;
    for (std::int64_t i = 0; i < tiles; ++i) {
      const std::int64_t t = p.T * i / tiles;
      const int tokens = static_cast<int>(p.T * (i + 1) / tiles - t);
      for (std::int64_t c = 0; c < p.k; c += chunk) {
        const std::int64_t k = c + chunk < p.k ? chunk : p.k - c;
        const bool last = c + k == p.k;
        const Act* const a = act + t * p.act_stride + c;
        for (std::int64_t j = begin; j < end; j += ROWS) {
          const int rows = static_cast<int>(end - j < ROWS ? end - j : ROWS);
          // Rows past the end repeat the last one, so nothing outside the matrix is read; their sums are dropped.
          const Weight* w[ROWS];
          for (int u = 0; u < ROWS; ++u) w[u] = base + (j + (u < rows ? u : rows - 1)) * p.k + c;
          typename P::Acc* const rest = carry[(j - begin) / ROWS];
          with_count<kTile>(tokens, [&](auto count) {
            tile<P, ROWS, decltype(count)::value>(w, a, p.act_stride, k, i == 0 ? ahead : nullptr, c == 0, last, rest,
                                                  sums);
          });
          if (i == 0 && ahead) ahead += ROWS * k * static_cast<std::int64_t>(sizeof(Weight));
          if (last)
            for (int u = 0; u < tokens; ++u) Store<P>::store(p, t + u, j, rows, sums + u * 4);
        }
      }
    }
  }
}

// One tile of tokens whose activations leave room in the first-level cache takes whole rows, four at a time. Else
// chunks of k: panels of a few tiles where one tile of tokens uses them, of up to kPanelBytes where many do.
template <class P, template <class> class Store>
void product(const Product& p, std::int64_t row_begin, std::int64_t row_end) {
  constexpr std::int64_t kChunk = kChunkBytes / static_cast<std::int64_t>(sizeof(typename P::Act));
  const std::int64_t row_bytes = p.k * static_cast<std::int64_t>(sizeof(typename P::Weight));
  constexpr int kWide = P::kTokens * 4 / 3;
  if (p.T <= P::kTokens) {
    sweep<P, Store, 4>(p, row_begin, row_end, 4, p.k);
  } else if (p.T <= kWide) {
    sweep<P, Store, 3>(p, row_begin, row_end, 12, 2 * kChunk);
  } else if (p.T <= 2 * P::kTokens) {
    sweep<P, Store, 4>(p, row_begin, row_end, 4, p.k);
  } else if (p.T <= 2 * kWide) {
    sweep<P, Store, 3>(p, row_begin, row_end, 12, 2 * kChunk);
  } else {
    std::int64_t panel = kPanelBytes / row_bytes / 4 * 4;
    panel = panel < 8 ? 8 : panel > kPanelTiles * 4 ? kPanelTiles * 4 : panel;
    sweep<P, Store, 4>(p, row_begin, row_end, panel, kChunk);
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

template <class Q, class X>
void dequantise_row(const void* in, float row_scale, const float* col_scale, void* out, std::int64_t count) {
  const Q* q = static_cast<const Q*>(in);
  X* b = static_cast<X*>(out);
  if (col_scale) {
    for (std::int64_t i = 0; i < count; ++i) b[i] = from_float<X>(to_float(q[i]) * (row_scale * col_scale[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) b[i] = from_float<X>(to_float(q[i]) * row_scale);
  }
}

template <class X>
constexpr RowKernels row_kernels() {
  return RowKernels{scale_row<X>, accumulate<X>, dequantise_row<std::int8_t, X>, dequantise_row<F8, X>};
}

}  // namespace
}  // namespace t2::cpu
