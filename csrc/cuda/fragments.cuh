// One stage of a warp's ring in shared memory, and from there to the operands of the tensor cores.
//
// A stage holds KT = ROW_BYTES / sizeof(Weight) consecutive k of ROWS rows of the weight, then of TOKENS rows of the
// activations. Rows lie one behind the other; the 16-byte chunks of a row are permuted by its number, so that the
// lanes of one access meet 32 different banks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "convert.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace t2::cuda {

constexpr int CHUNK_BYTES = 16;

// Chunk c of row r lies in place c ^ flip(r). All sizes are powers of two and no two of the numbers that make up a
// row or a chunk share a bit, so flip(a + b) = flip(a) ^ flip(b), and whatever is known at compile time can be put
// in by a last exclusive or.

// For load_matrices: eight rows, the same chunk of each.
template <int ROW_BYTES>
struct ByRow {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "one or two rows in the 128 bytes of all banks");
  static __device__ __forceinline__ constexpr int flip(int row) { return ROW_BYTES == 128 ? row & 7 : row >> 1 & 3; }
};

// For 8-byte loads: four rows, the same two neighbouring chunks of each.
struct ByPair {
  static __device__ __forceinline__ constexpr int flip(int row) { return (row & 3) << 1; }
};

template <typename Tile, typename Element, typename Weight>
struct Stage {
  static constexpr bool WIDEN = sizeof(Weight) == 1;
  static constexpr int KT = Tile::ROW_BYTES / static_cast<int>(sizeof(Weight));
  static constexpr int ACT_ROW_BYTES = KT * static_cast<int>(sizeof(Element));
  static constexpr int WEIGHT_BYTES = Tile::ROWS * Tile::ROW_BYTES;
  static constexpr int BYTES = WEIGHT_BYTES + Tile::TOKENS * ACT_ROW_BYTES;
  // An exclusive or on the offset of a row must stay within the row.
  static constexpr int ALIGN = ACT_ROW_BYTES > 128 ? ACT_ROW_BYTES : 128;
  static_assert(WEIGHT_BYTES % ALIGN == 0 && BYTES % ALIGN == 0 && Tile::MEET_BYTES % ALIGN == 0, "rows on their size");
};

template <typename Tile, typename Element, typename Weight, bool WIDEN>
struct ActPlaceOf {
  using type = ByRow<Stage<Tile, Element, Weight>::ACT_ROW_BYTES>;
};
template <typename Tile, typename Element, typename Weight>
struct ActPlaceOf<Tile, Element, Weight, true> {
  using type = ByPair;
};

// Two int8 as bf16, exactly; each is the lower byte of its half of `two`, the upper one is 0x43.
__device__ __forceinline__ std::uint32_t bf16x2_of(std::uint32_t two, std::int8_t) {
  // Such a half is 128 + the lower seven bits. Less 128, or 256 where the sign bit is set, that is the int8.
  constexpr std::uint32_t ONE = 0x3f803f80u;
  return fma_bf16x2(two & 0xff7fff7fu, ONE, (two & 0xff80ff80u) | 0x80008000u);
}

// Two fp8 as bf16, exactly; each is the upper byte of its half of `two`.
__device__ __forceinline__ std::uint32_t bf16x2_of(std::uint32_t two, E4M3) {
  // In the places of a bf16 it is the number times 2^-120, subnormal ones too.
  constexpr std::uint32_t POWER_120 = 0x7b807b80u, ZERO = 0x80008000u;  // -0: what is -0 stays so
  return fma_bf16x2((two & 0x80008000u) | (two >> 4 & 0x07f007f0u), POWER_120, ZERO);
}

// Four 8-bit numbers (the bytes of `packed`, lowest first) as bf16: low = the first two, high = the others.
template <typename Weight>
__device__ __forceinline__ void widen(std::uint32_t packed, std::uint32_t& low, std::uint32_t& high) {
  constexpr bool INT8 = std::is_same_v<Weight, std::int8_t>;
  low = bf16x2_of(__byte_perm(packed, 0x43434343u, INT8 ? 0x4140 : 0x1404), Weight{});
  high = bf16x2_of(__byte_perm(packed, 0x43434343u, INT8 ? 0x4342 : 0x3424), Weight{});
}

// Operands for 32 consecutive k, as two steps of 16. Offsets count bytes of shared memory.
template <typename Tile, typename Element, typename Weight>
struct Fragments {
  using S = Stage<Tile, Element, Weight>;
  using WeightPlace = ByRow<Tile::ROW_BYTES>;
  using ActPlace = typename ActPlaceOf<Tile, Element, Weight, S::WIDEN>::type;

  // What depends on the lane alone.
  static __device__ __forceinline__ int weight_lane(int lane) {
    const int row = lane % 16;
    return row * Tile::ROW_BYTES + (lane / 16 ^ WeightPlace::flip(row)) * CHUNK_BYTES;
  }
  static __device__ __forceinline__ int act_lane(int lane) {
    const int token = S::WIDEN ? lane / 4 : lane % 8;
    const int chunk = S::WIDEN ? lane % 4 / 2 : lane / 8;
    const int place = token * S::ACT_ROW_BYTES + (chunk ^ ActPlace::flip(token)) * CHUNK_BYTES;
    return S::WEIGHT_BYTES + place + (S::WIDEN ? lane % 2 * 8 : 0);
  }

  // Rows [16 i, 16 i + 16) of the weight; `from` = stage + weight_lane.
  static __device__ __forceinline__ void weight(int from, int i, int k32, std::uint32_t (&to)[2][4]) {
    const int rows = 16 * i * Tile::ROW_BYTES;
    if constexpr (S::WIDEN) {
      // 16 of them fill the 16 bytes of a matrix row: this lane gets k = 4 (lane % 4) and the next three. Within a
      // step of 16, the order of k is free as long as both operands share it; `act` has the same.
      std::uint32_t packed[4];
      load_matrices((from ^ 2 * k32 * CHUNK_BYTES) + rows, packed);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        widen<Weight>(packed[2 * step], to[step][0], to[step][2]);
        widen<Weight>(packed[2 * step + 1], to[step][1], to[step][3]);
      }
    } else {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        load_matrices((from ^ (4 * k32 + 2 * step) * CHUNK_BYTES) + rows, to[step]);
      }
    }
  }

  // Tokens [8 j, 8 j + 8): two registers for each of the two steps; `from` = stage + act_lane.
  static __device__ __forceinline__ void act(int from, int j, int k32, std::uint32_t (&to)[4]) {
    const int tokens = 8 * j * S::ACT_ROW_BYTES;
    if constexpr (S::WIDEN) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint2 pair = load_8((from ^ (4 * k32 + 2 * step) * CHUNK_BYTES) + tokens);
        to[2 * step] = pair.x;
        to[2 * step + 1] = pair.y;
      }
    } else {
      load_matrices((from ^ 4 * k32 * CHUNK_BYTES) + tokens, to);
    }
  }
};

// Copies one operand of a stage after another: ROW_BYTES of ROWS rows of a matrix (rows, length), what lies outside
// as zeros. `length` is a multiple of a chunk. Each lane copies the same chunk of every STEP-th row.
template <int ROWS, int ROW_BYTES, typename Place, typename T>
struct RowCopies {
  static constexpr int CHUNKS = ROW_BYTES / CHUNK_BYTES, STEP = WARP / CHUNKS;
  static constexpr int KT = ROW_BYTES / static_cast<int>(sizeof(T));
  static_assert(ROWS % STEP == 0, "every lane copies the same number of chunks");

  const T* from;
  std::int64_t stride;
  int rows_left, columns_left;

  __device__ __forceinline__ void start(const T* matrix, std::int64_t stride_, int first_row, int rows, int k,
                                        int length, int lane) {
    const int row = first_row + lane / CHUNKS, column = k + lane % CHUNKS * (CHUNK_BYTES / static_cast<int>(sizeof(T)));
    stride = stride_;
    from = matrix + row * stride + column;
    rows_left = rows - row;
    columns_left = length - column;
  }

  __device__ __forceinline__ void copy(int stage, int lane) const {
    const int row = lane / CHUNKS;
    const int to = stage + row * ROW_BYTES + (lane % CHUNKS ^ Place::flip(row)) * CHUNK_BYTES;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
      const bool there = i * STEP < rows_left && columns_left > 0;
      copy_16((to ^ Place::flip(i * STEP) * CHUNK_BYTES) + i * STEP * ROW_BYTES, from + i * STEP * stride, there);
    }
  }

  __device__ __forceinline__ void advance() {
    from += KT;
    columns_left -= KT;
  }
};

}  // namespace t2::cuda
