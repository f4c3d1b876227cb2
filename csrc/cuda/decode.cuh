// Decode (few tokens): one kernel body, used twice.
//
//     out[t, i] = epilogue( sum_k act[t, k] * weight[i, k] )
//
//     project:  act = x (T, n),     weight = V stored (r, n)  ->  work = sum * d_row * scale, and h = sum if asked
//     expand:   act = work (T, r),  weight = U (m, r)         ->  y = sum + bias
//
// A block owns ROWS rows of the weight and up to TOKENS tokens; its threads split k. Thread p takes elements
// [p * VEC, (p + 1) * VEC), then strides by the block, adds them in rising order, and block_sums adds the threads
// in a fixed tree. This order depends on k alone, which is why a row's bits depend on neither T nor its neighbours
// nor the path by which the elements were loaded. The factors are read once per TOKENS tokens; blocks that share
// rows are neighbours in the grid, so the repeats come from L2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "call.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "reduce.cuh"

namespace t2::cuda {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = 4;  // rows of the weight per block: 4 x 16 bytes in flight per thread

// act (tokens, length) with a row stride; weight (rows, length) contiguous.
template <typename Act, typename Weight>
struct Operands {
  const Act* act;
  std::int64_t act_stride;
  const Weight* weight;
  std::int64_t tokens, rows, length;
  std::int64_t token_tiles;
};

// VECTOR: all rows allow 16-byte loads. Grid: token tiles innermost, then groups of ROWS rows.
template <int TOKENS, bool VECTOR, typename Act, typename Weight, typename Epilogue>
__global__ void __launch_bounds__(THREADS, 2)
    decode_kernel(const Operands<Act, Weight> in, const Epilogue epilogue) {
  constexpr int VEC = LOAD_BYTES / static_cast<int>(sizeof(Weight));
  const std::int64_t block = blockIdx.x;
  const std::int64_t first_token = block % in.token_tiles * TOKENS;
  const std::int64_t first_row = block / in.token_tiles * ROWS;
  const int thread = static_cast<int>(threadIdx.x);

  float sum[TOKENS * ROWS] = {};
  // One token leaves registers for two rounds of loads in flight; more tokens do not.
#pragma unroll(TOKENS == 1 ? 2 : 1)
  for (std::int64_t k = thread * VEC; k < in.length; k += THREADS * VEC) {
    float weight[ROWS][VEC];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      // Rows and tokens past the end repeat the last one; the epilogue drops them.
      const std::int64_t row = first_row + i < in.rows ? first_row + i : in.rows - 1;
      const Weight* from = in.weight + row * in.length + k;
      if constexpr (VECTOR) {
        load_vector(from, weight[i]);
      } else {
        load_elements(from, in.length - k, weight[i]);
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const std::int64_t token = first_token + t < in.tokens ? first_token + t : in.tokens - 1;
      const Act* from = in.act + token * in.act_stride + k;
      float act[VEC];
      if constexpr (VECTOR) {
        load_vector(from, act);
      } else {
        load_elements(from, in.length - k, act);
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[t * ROWS + i] = fmaf(act[v], weight[i][v], sum[t * ROWS + i]);
      }
    }
  }

  __shared__ float partial[WARPS][TOKENS * ROWS];
  const float total = block_sums<WARPS>(sum, partial);
  const std::int64_t token = first_token + thread / ROWS;
  const std::int64_t row = first_row + thread % ROWS;
  if (thread < TOKENS * ROWS && token < in.tokens && row < in.rows) epilogue(token, row, total);
}

template <int TOKENS, bool VECTOR, typename Act, typename Weight, typename Epilogue>
void launch_tile(const char* what, Operands<Act, Weight> in, const Epilogue& epilogue, cudaStream_t stream) {
  in.token_tiles = (in.tokens + TOKENS - 1) / TOKENS;
  const std::int64_t groups = (in.rows + ROWS - 1) / ROWS;
  launch(decode_kernel<TOKENS, VECTOR, Act, Weight, Epilogue>, what, {in.token_tiles * groups, THREADS}, stream, in,
         epilogue);
}

// The smallest tile that holds the tokens; the tile changes the speed, never a bit.
template <typename Act, typename Weight, typename Epilogue>
void launch_decode(const char* what, const Operands<Act, Weight>& in, const Epilogue& epilogue, cudaStream_t stream) {
  constexpr int VEC = LOAD_BYTES / static_cast<int>(sizeof(Weight));
  const bool vector = vector_rows(in.act, in.act_stride, in.length, VEC) &&
                      vector_rows(in.weight, in.length, in.length, VEC);
  if (!vector) return launch_tile<4, false>(what, in, epilogue, stream);
  if (in.tokens == 1) return launch_tile<1, true>(what, in, epilogue, stream);
  if (in.tokens <= 4) return launch_tile<4, true>(what, in, epilogue, stream);
  return launch_tile<8, true>(what, in, epilogue, stream);
}

template <typename Element, typename Weight>
void decode(const DecodeCall& c) {
  const Operands<Element, Weight> project{static_cast<const Element*>(c.x), c.x_stride,
                                          static_cast<const Weight*>(c.V), c.T, c.r, c.n, 0};
  launch_decode("svf_decode (x V)", project, ScaleByDiagonal<Element, float>::of(c), c.stream);
  for (int i = 0; i < c.members; ++i) {
    const DecodeMember& m = c.member[i];
    const Operands<float, Weight> expand{static_cast<const float*>(c.work) + m.column, c.r,
                                         static_cast<const Weight*>(m.U), c.T, m.m, m.r, 0};
    launch_decode("svf_decode (h Uᵀ)", expand, AddBias<Element>::of(m), c.stream);
  }
}

}  // namespace t2::cuda
