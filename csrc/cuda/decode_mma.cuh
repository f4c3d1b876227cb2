// Decode (few tokens) on tensor cores: one kernel for both products, bf16 and fp16 activations.
//
//     phase 0:  work = round((x V) * d_row * scale)      weight V stored (r, n), act x (T, n)
//     phase 1:  y    = work U^T + bias                   weight U (m, r),        act work (T, r)
//
// Layers that share x are a group: phase 0 takes their V, stored one under another, as one weight, and phase 1 goes
// over the items of one layer after another, each with its own U and its own columns of work.
//
// The weight is the 16-row operand of the tensor cores, tokens are the 8-column one. An item is ROWS rows of the
// weight by TOKENS tokens; blocks take items in turn. A block has four warps, and each owns one quarter of k, with a
// ring of its own in shared memory that copies fill STAGES - 1 steps ahead: no barrier inside a product. The ring
// runs on from item to item and, in a launch of both phases, from V to U: the copies of U's first steps are on their
// way before the barrier between the phases, which only the activations of phase 1 have to wait for.
//
// Order of a sum: k is cut into quarters at multiples of SLICE_ALIGN; in each, tensor cores add k in rising steps of
// 16; the result is (q0 + q1) + (q2 + q3). It depends on k alone, so tile, stages, blocks, launch form and the other
// tokens of a call never change a bit.
#pragma once

#include <cstdint>

#include "call.cuh"
#include "fragments.cuh"
#include "grid_barrier.cuh"
#include "load.cuh"
#include "plan.h"
#include "ptx.cuh"

namespace t2::cuda {

constexpr int SLICES = 4;
constexpr int SLICE_ALIGN = 128;  // a multiple of every stage's KT
constexpr int MMA_THREADS = SLICES * WARP;
constexpr int MEET_TOKENS = 8;  // the quarters of a sum meet in shared memory, so many tokens at a time

template <int ROWS_, int TOKENS_, int ROW_BYTES_>
struct Tile {
  static constexpr int ROWS = ROWS_, TOKENS = TOKENS_, ROW_BYTES = ROW_BYTES_;
  static constexpr int MEET_PITCH = ROWS_ + 4;  // 4: no two lanes of a store in one bank
  static constexpr int MEET_BYTES = SLICES * MEET_TOKENS * MEET_PITCH * 4;
};

// act (T, length) with a row stride; weight (rows, length) contiguous; all rows on 16 bytes. Sizes have 32 bits, which
// saves registers; offsets have 64.
template <typename Element, typename Weight>
struct Product {
  const Element* act;
  std::int64_t act_stride;
  const Weight* weight;
  int rows, length;
};

// The second product of one member of a group.
template <typename Element, typename Weight>
struct MmaMember {
  Product<Element, Weight> product;
  AddBias<Element> finish;
  int first_item;  // of phase 1; beyond all items where there is no such member
};

template <typename Element, typename Weight>
struct MmaCall {
  Product<Element, Weight> project;
  MmaMember<Element, Weight> member[MAX_MEMBERS];
  int tokens;
  int items[2];  // of a phase
  ScaleByDiagonal<Element, Element> scale;
  std::uint32_t* barrier;  // for a launch of both phases
  int first_phase, last_phase;
  int stages;

  // Whose item of phase 1. Values and selections: an index into a kernel's arguments would cost a copy of them.
  __device__ __forceinline__ MmaMember<Element, Weight> owner(int item) const {
    MmaMember<Element, Weight> found = member[0];
#pragma unroll
    for (int i = 1; i < MAX_MEMBERS; ++i) {
      if (item >= member[i].first_item) found = member[i];
    }
    return found;
  }
};

// An item: which rows and tokens of which product, and which k this warp has of it.
template <typename Tile, typename Element, typename Weight>
struct Share {
  using S = Stage<Tile, Element, Weight>;
  Product<Element, Weight> product;
  int first_row, first_token, begin, steps;

  __device__ __forceinline__ Share(const MmaCall<Element, Weight>& call, int phase, int item) {
    if (phase == 0) {
      product = call.project;
    } else {
      const MmaMember<Element, Weight> owner = call.owner(item);
      product = owner.product;
      item -= owner.first_item;
    }
    const int token_tiles = (call.tokens - 1) / Tile::TOKENS + 1, length = product.length;
    first_row = item / token_tiles * Tile::ROWS;
    first_token = item % token_tiles * Tile::TOKENS;
    const int quarter = ((length - 1) / (SLICES * SLICE_ALIGN) + 1) * SLICE_ALIGN;
    begin = static_cast<int>(threadIdx.x) / WARP * quarter;
    const int left = length - begin;
    steps = left <= 0 ? 0 : ((left < quarter ? left : quarter) - 1) / S::KT + 1;
  }
};

// Copies a warp's steps into stages, one after another: over all its items of a phase, then of the next phase.
template <typename Tile, typename Element, typename Weight>
struct Cursor {
  using S = Stage<Tile, Element, Weight>;
  using F = Fragments<Tile, Element, Weight>;
  const MmaCall<Element, Weight>& call;
  int lane, phase, item, items, step, steps;
  RowCopies<Tile::ROWS, Tile::ROW_BYTES, typename F::WeightPlace, Weight> weight;
  RowCopies<Tile::TOKENS, S::ACT_ROW_BYTES, typename F::ActPlace, Element> act;

  __device__ __forceinline__ Cursor(const MmaCall<Element, Weight>& call_, int first, int lane_)
      : call(call_), lane(lane_) {
    enter(first);
  }

  __device__ __forceinline__ void enter(int next_phase) {
    phase = next_phase;
    item = static_cast<int>(blockIdx.x);
    items = phase == 0 ? call.items[0] : call.items[1];
    start_item();
  }

  // The first item from `item` on of which this warp has any k: a product may be too short for all four warps.
  __device__ __forceinline__ void start_item() {
    for (; item < items; item += static_cast<int>(gridDim.x)) {
      const Share<Tile, Element, Weight> share(call, phase, item);
      if (share.steps == 0) continue;
      const Product<Element, Weight>& from = share.product;
      step = 0;
      steps = share.steps;
      weight.start(from.weight, from.length, share.first_row, from.rows, share.begin, from.length, lane);
      act.start(from.act, from.act_stride, share.first_token, call.tokens, share.begin, from.length, lane);
      return;
    }
  }

  __device__ __forceinline__ bool has_step() const { return item < items; }

  __device__ __forceinline__ void next_step() {
    weight.advance();
    act.advance();
    if (++step < steps) return;
    item += static_cast<int>(gridDim.x);
    start_item();
  }
};

// A warp's ring of stages. Every step ends one group of copies, an empty one where nothing is left to copy, so that
// "all but the latest stages - 2 groups" always means "the next step is there".
template <typename Tile, typename Element, typename Weight>
class Ring {
 public:
  using S = Stage<Tile, Element, Weight>;

  __device__ __forceinline__ Ring(const MmaCall<Element, Weight>& call, int memory, int lane)
      : ahead_(call, call.first_phase, lane), memory_(memory), lane_(lane), stages_(call.stages),
        act_phase_(call.first_phase == 0 ? 0 : -1) {}

  __device__ __forceinline__ void fill() {
    for (int i = 0; i < stages_ - 1; ++i) copy_next();
  }

  // The activations of `phase` exist now: those of the steps whose weights are under way follow.
  __device__ __forceinline__ void activations_exist(const MmaCall<Element, Weight>& call, int phase) {
    act_phase_ = phase;
    Cursor<Tile, Element, Weight> late(call, phase, lane_);
    int slot = read_;
    for (int i = 0; i < stages_ - 1; ++i) {
      if (late.has_step()) {
        late.act.copy(stage(slot) + S::WEIGHT_BYTES, lane_);
        late.next_step();
      }
      copies_commit();
      slot = following(slot);
    }
  }

  // The next step's stage. The slot read in the step before is filled again.
  __device__ __forceinline__ int next() {
    wait(stages_ - 2);
    __syncwarp();  // the other lanes' copies have landed, and no lane still reads the step before
    copy_next();
    const int here = stage(read_);
    read_ = following(read_);
    return here;
  }

 private:
  __device__ __forceinline__ int stage(int slot) const { return memory_ + slot * S::BYTES; }
  __device__ __forceinline__ int following(int slot) const { return slot + 1 == stages_ ? 0 : slot + 1; }

  __device__ __forceinline__ void copy_next() {
    // From the last step of V on to the first of U.
    if (!ahead_.has_step() && ahead_.phase < ahead_.call.last_phase) ahead_.enter(ahead_.phase + 1);
    if (ahead_.has_step()) {
      const int to = stage(write_);
      ahead_.weight.copy(to, lane_);
      if (ahead_.phase == act_phase_) ahead_.act.copy(to + S::WEIGHT_BYTES, lane_);
      ahead_.next_step();
    }
    copies_commit();
    write_ = following(write_);
  }

  static __device__ __forceinline__ void wait(int pending) {
    // The instruction takes a constant. Not a switch: ptxas would make a table of it, in memory.
    if (pending < 3) {
      pending == 0 ? copies_wait<0>() : pending == 1 ? copies_wait<1>() : copies_wait<2>();
    } else if (pending < 5) {
      pending == 3 ? copies_wait<3>() : copies_wait<4>();
    } else {
      pending == 5 ? copies_wait<5>() : copies_wait<6>();
    }
  }
  static_assert(MAX_STAGES - 2 == 6, "wait() knows every number of groups");

  Cursor<Tile, Element, Weight> ahead_;
  int memory_, lane_, stages_;
  int act_phase_;  // of which phase activations can be copied with their weights
  int read_ = 0, write_ = 0;
};

// acc += weight (ROWS x KT) * act (TOKENS x KT)^T of one stage.
template <typename Tile, typename Element, typename Weight>
__device__ __forceinline__ void multiply_stage(int stage, int lane,
                                               float (&acc)[Tile::ROWS / 16][Tile::TOKENS / 8][4]) {
  using F = Fragments<Tile, Element, Weight>;
  const int weights = stage + F::weight_lane(lane), acts = stage + F::act_lane(lane);
#pragma unroll
  for (int k32 = 0; k32 < F::S::KT / 32; ++k32) {
    std::uint32_t weight[Tile::ROWS / 16][2][4];
#pragma unroll
    for (int i = 0; i < Tile::ROWS / 16; ++i) F::weight(weights, i, k32, weight[i]);
#pragma unroll
    for (int j = 0; j < Tile::TOKENS / 8; ++j) {
      std::uint32_t act[4];
      F::act(acts, j, k32, act);
#pragma unroll
      for (int i = 0; i < Tile::ROWS / 16; ++i) {
        multiply_add<Element>(acc[i][j], weight[i][0], act[0], act[1]);
        multiply_add<Element>(acc[i][j], weight[i][1], act[2], act[3]);
      }
    }
  }
}

// The four quarters of every sum of an item meet; `epilogue` gets (token, row, sum).
template <typename Tile, typename Epilogue>
__device__ __forceinline__ void meet(const float (&acc)[Tile::ROWS / 16][Tile::TOKENS / 8][4], float* partial,
                                     int tokens, int rows, const Epilogue& epilogue) {
  constexpr int SLICE = MEET_TOKENS * Tile::MEET_PITCH;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % WARP;
  float* own = partial + thread / WARP * SLICE;
#pragma unroll
  for (int first = 0; first < Tile::TOKENS; first += MEET_TOKENS) {
    if (first < tokens) {  // not `break`, which makes ptxas spill
#pragma unroll
      for (int i = 0; i < Tile::ROWS / 16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * i + lane / 4 + (e < 2 ? 0 : 8), token = 2 * (lane % 4) + e % 2;
          own[token * Tile::MEET_PITCH + row] = acc[i][first / MEET_TOKENS][e];
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int at = thread; at < MEET_TOKENS * Tile::ROWS; at += MMA_THREADS) {
        const int token = at / Tile::ROWS, row = at % Tile::ROWS;
        const float* q = partial + token * Tile::MEET_PITCH + row;
        const float sum = (q[0] + q[SLICE]) + (q[2 * SLICE] + q[3 * SLICE]);
        if (first + token < tokens && row < rows) epilogue(first + token, row, sum);
      }
      __syncthreads();  // before the next tokens, or the next item, write there
    }
  }
}

template <typename Tile, typename Element, typename Weight>
__global__ void __launch_bounds__(MMA_THREADS, 2)
    decode_mma_kernel(const __grid_constant__ MmaCall<Element, Weight> call) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  float* partial = reinterpret_cast<float*>(dynamic_shared());
  const int slice = static_cast<int>(threadIdx.x) / WARP;
  const int ring_bytes = call.stages * Stage<Tile, Element, Weight>::BYTES;
  Ring<Tile, Element, Weight> ring(call, Tile::MEET_BYTES + slice * ring_bytes, lane);

  let_the_next_kernel_start();
  ring.fill();
  for (int phase = call.first_phase; phase <= call.last_phase; ++phase) {
    if (phase == 1) {
      if (call.first_phase == 0) {
        grid_barrier(call.barrier);
      } else {
        wait_for_the_kernel_before();
      }
      ring.activations_exist(call, phase);
    }
    const int items = phase == 0 ? call.items[0] : call.items[1];
    for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
      const Share<Tile, Element, Weight> share(call, phase, item);
      float acc[Tile::ROWS / 16][Tile::TOKENS / 8][4] = {};
      for (int step = 0; step < share.steps; ++step) {
        multiply_stage<Tile, Element, Weight>(ring.next(), lane, acc);
      }
      const AddBias<Element> finish = call.owner(item).finish;
      const int tokens = call.tokens - share.first_token, rows = share.product.rows - share.first_row;
      meet<Tile>(acc, partial, tokens, rows, [&](int token, int row, float sum) {
        if (phase == 0) {
          call.scale(share.first_token + token, share.first_row + row, sum);
        } else {
          finish(share.first_token + token, share.first_row + row, sum);
        }
      });
    }
  }
}

}  // namespace t2::cuda
