// Mixtures of experts into rows of an arena: one thread owns a few neighbouring columns of one row and adds the
// experts one after another, so there is nothing to synchronise and nothing to reduce.
#include "mix.h"

#include "launch.cuh"
#include "load.cuh"

namespace t2::cuda {
namespace {

constexpr int MIX_THREADS = 128;
constexpr int MIX_COLUMNS = 4;  // of a thread: 16 bytes of fp32

template <typename Z>
struct Mixing {
  const float *S, *alpha;
  const Z* z;
  const std::int32_t *indices, *rows;
  const std::int64_t* offsets;
  float* out;
  std::int64_t z_stride, experts, layers, out_stride, slots, K, R, tiles;
};

// The deviation z - 1 of one stored element.
__device__ __forceinline__ float deviation(float z) { return __fsub_rn(z, 1.0f); }
__device__ __forceinline__ float deviation(__nv_bfloat16 z) { return to_float(z); }

// Four elements of which the first `valid` are there; VECTOR: all are, and may be loaded at once.
template <bool VECTOR>
__device__ __forceinline__ void load_deviations(const float* from, int valid, float (&to)[MIX_COLUMNS]) {
  if constexpr (VECTOR) {
    load_vector(from, to);
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) to[v] = deviation(to[v]);
  } else {
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) to[v] = v < valid ? deviation(from[v]) : 0.0f;
  }
}
template <bool VECTOR>
__device__ __forceinline__ void load_deviations(const __nv_bfloat16* from, int valid, float (&to)[MIX_COLUMNS]) {
  __nv_bfloat16 element[MIX_COLUMNS] = {};
  if constexpr (VECTOR) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    std::memcpy(element, &raw, sizeof(raw));
  } else {
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) {
      if (v < valid) element[v] = from[v];
    }
  }
#pragma unroll
  for (int v = 0; v < MIX_COLUMNS; ++v) to[v] = deviation(element[v]);
}

// The last layer that begins at or before `column`.
__device__ __forceinline__ std::int64_t layer_of(const std::int64_t* offsets, std::int64_t layers,
                                                 std::int64_t column) {
  std::int64_t low = 0, high = layers - 1;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= column) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <bool VECTOR, bool LAYERED, typename Z>
__global__ void __launch_bounds__(MIX_THREADS) mix_kernel(const Mixing<Z> m) {
  const std::int64_t i = blockIdx.x / m.tiles;
  const std::int64_t row = m.rows ? m.rows[i] : i;
  const std::int64_t tile = blockIdx.x % m.tiles;
  const std::int64_t column = (tile * MIX_THREADS + static_cast<std::int64_t>(threadIdx.x)) * MIX_COLUMNS;
  if (row < 0 || row >= m.slots || column >= m.R) return;
  const int valid = m.R - column < MIX_COLUMNS ? static_cast<int>(m.R - column) : MIX_COLUMNS;

  // Where the weights of each column begin: layers may end between two of them.
  std::int64_t line[MIX_COLUMNS];
#pragma unroll
  for (int v = 0; v < MIX_COLUMNS; ++v) line[v] = i * m.K;
  if constexpr (LAYERED) {
    std::int64_t layer = layer_of(m.offsets, m.layers, column);
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) {
      while (layer + 1 < m.layers && m.offsets[layer + 1] <= column + v) ++layer;
      line[v] = (i * m.layers + layer) * m.K;
    }
  }

  float total[MIX_COLUMNS] = {1.0f, 1.0f, 1.0f, 1.0f};
  bool foreign = false;
  for (std::int64_t k = 0; k < m.K; ++k) {
    const std::int64_t expert = m.indices ? m.indices[i * m.K + k] : k;
    foreign |= expert < -1 || expert >= m.experts;
    if (expert < 0 || expert >= m.experts) continue;
    float weight[MIX_COLUMNS];
    bool wanted = false;
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) {
      weight[v] = LAYERED || v == 0 ? m.alpha[line[v] + k] : weight[0];
      wanted |= weight[v] != 0.0f;
    }
    if (!wanted) continue;
    float z[MIX_COLUMNS];
    load_deviations<VECTOR>(m.z + expert * m.z_stride + column, valid, z);
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) {
      if (weight[v] != 0.0f) total[v] = __fadd_rn(total[v], __fmul_rn(weight[v], z[v]));
    }
  }

  float* const out = m.out + row * m.out_stride + column;
  const float* const S = m.S + column;
  if constexpr (VECTOR) {
    float s[MIX_COLUMNS];
    load_vector(S, s);
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) s[v] = foreign ? nanf("") : __fmul_rn(s[v], total[v]);
    __stcg(reinterpret_cast<float4*>(out), float4{s[0], s[1], s[2], s[3]});  // an assignment is split in four
  } else {
#pragma unroll
    for (int v = 0; v < MIX_COLUMNS; ++v) {
      if (v < valid) out[v] = foreign ? nanf("") : __fmul_rn(S[v], total[v]);
    }
  }
}

template <bool VECTOR, typename Z>
void launch_mix(const Mixing<Z>& m, std::int64_t B, cudaStream_t stream) {
  const LaunchShape shape{B * m.tiles, MIX_THREADS};
  if (m.offsets) {
    launch(mix_kernel<VECTOR, true, Z>, "mix", shape, stream, m);
  } else {
    launch(mix_kernel<VECTOR, false, Z>, "mix", shape, stream, m);
  }
}

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("mix: ") + message);
}

}  // namespace

void mix(Address S, Address Z, std::int64_t z_stride, std::int64_t experts, int z_dtype, Address alpha,
         Address indices, Address rows, Address offsets, std::int64_t layers, Address out, std::int64_t out_stride,
         std::int64_t slots, std::int64_t B, std::int64_t K, std::int64_t R, int device, Address stream) {
  require(B >= 0 && K >= 0 && R >= 0 && experts >= 0 && slots >= 0 && layers >= 1, "sizes must not be negative");
  require(z_dtype == kF32 || z_dtype == kBF16, "z_dtype must be fp32 (0) or bf16 (1)");
  require(indices || K <= experts, "without indices K must be at most experts");
  require(rows || B <= slots, "without rows there must be a row of out for each of B");
  if (B == 0 || R == 0) return;
  require(S && out && (K == 0 || alpha) && (experts == 0 || Z), "S, Z, alpha and out must be given");
  const DeviceGuard guard(device);
  const auto run = [&](auto* z) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(z)>>;
    constexpr std::int64_t PER_TILE = MIX_THREADS * MIX_COLUMNS;
    const Mixing<Element> m{pointer<const float>(S),
                            pointer<const float>(alpha),
                            z,
                            pointer<const std::int32_t>(indices),
                            pointer<const std::int32_t>(rows),
                            pointer<const std::int64_t>(offsets),
                            pointer<float>(out),
                            z_stride,
                            experts,
                            layers,
                            out_stride,
                            slots,
                            K,
                            R,
                            (R + PER_TILE - 1) / PER_TILE};
    const auto on_stream = pointer<std::remove_pointer_t<cudaStream_t>>(stream);
    // Whether four columns may be loaded and stored at once: of every expert, of S and of every row of out.
    const bool vector = Z % (MIX_COLUMNS * sizeof(Element)) == 0 && z_stride % MIX_COLUMNS == 0 &&
                        S % LOAD_BYTES == 0 && out % LOAD_BYTES == 0 && out_stride % MIX_COLUMNS == 0 &&
                        R % MIX_COLUMNS == 0;
    return vector ? launch_mix<true>(m, B, on_stream) : launch_mix<false>(m, B, on_stream);
  };
  return z_dtype == kBF16 ? run(pointer<const __nv_bfloat16>(Z)) : run(pointer<const float>(Z));
}

}  // namespace t2::cuda
