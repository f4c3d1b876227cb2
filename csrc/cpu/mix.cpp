// Mixtures of experts into rows of an arena.
#include "mix.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "diagonal.h"
#include "threads.h"

namespace t2::cpu {
namespace {

// Columns at a time: the sums stay in the first-level cache.
constexpr std::int64_t kTile = 2048;

struct Mixing {
  const float *S, *alpha;
  const char* Z;
  const std::int32_t *indices, *rows;
  const std::int64_t* offsets;
  float* out;
  std::int64_t z_stride, experts, layers, out_stride, B, K, R, tiles;
  int z_dtype;
};

float widened(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// total += weight * (z - 1) over `count` columns; each operation rounds (-ffp-contract=off).
void add_expert(const Mixing& m, std::int64_t expert, std::int64_t column, std::int64_t count, float weight,
                float* total) {
  const std::int64_t first = expert * m.z_stride + column;
  if (m.z_dtype == kBF16) {
    const std::uint16_t* const z = reinterpret_cast<const std::uint16_t*>(m.Z) + first;
    for (std::int64_t c = 0; c < count; ++c) total[c] += weight * widened(z[c]);
  } else {
    const float* const z = reinterpret_cast<const float*>(m.Z) + first;
    for (std::int64_t c = 0; c < count; ++c) total[c] += weight * (z[c] - 1.0f);
  }
}

bool indices_fit(const Mixing& m, std::int64_t i) {
  if (!m.indices) return true;
  return std::all_of(m.indices + i * m.K, m.indices + (i + 1) * m.K,
                     [&](std::int32_t expert) { return expert >= -1 && expert < m.experts; });
}

// Columns [column, column + count) of one layer.
void mix_piece(const Mixing& m, std::int64_t i, std::int64_t layer, std::int64_t column, std::int64_t count,
               float* total) {
  std::fill(total, total + count, 1.0f);
  const float* const weights = m.alpha + (i * m.layers + layer) * m.K;
  for (std::int64_t k = 0; k < m.K; ++k) {
    const std::int64_t expert = m.indices ? m.indices[i * m.K + k] : k;
    if (expert >= 0 && weights[k] != 0.0f) add_expert(m, expert, column, count, weights[k], total);
  }
  for (std::int64_t c = 0; c < count; ++c) total[c] *= m.S[column + c];
}

void mix_tile(const Mixing& m, std::int64_t i, std::int64_t begin) {
  const std::int64_t row = m.rows ? m.rows[i] : i;
  if (row < 0) return;
  const std::int64_t end = std::min(begin + kTile, m.R);
  float* const out = m.out + row * m.out_stride;
  if (!indices_fit(m, i)) {
    std::fill(out + begin, out + end, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  float total[kTile];
  std::int64_t layer = 0;
  if (m.offsets) layer = std::upper_bound(m.offsets, m.offsets + m.layers + 1, begin) - m.offsets - 1;
  for (std::int64_t c = begin; c < end;) {
    if (m.offsets) {
      while (m.offsets[layer + 1] <= c) ++layer;  // layers may be empty
    }
    const std::int64_t stop = m.offsets ? std::min(end, m.offsets[layer + 1]) : end;
    mix_piece(m, i, layer, c, stop - c, total);
    std::copy(total, total + (stop - c), out + c);
    c = stop;
  }
}

void check(const Mixing& m, std::int64_t slots) {
  check_size("experts", m.experts, 0);
  check_size("layers", m.layers, 1);
  check_size("B", m.B, 0);
  check_size("K", m.K, 0);
  check_size("R", m.R, 0);
  if (m.z_dtype != kF32 && m.z_dtype != kBF16) {
    refuse("z_dtype must be 0 (fp32) or 1 (bf16), got " + std::to_string(m.z_dtype));
  }
  if (!m.indices && m.K > m.experts) refuse("without indices K must be at most experts");
  if (m.offsets && (m.offsets[0] != 0 || m.offsets[m.layers] != m.R ||
                    !std::is_sorted(m.offsets, m.offsets + m.layers + 1))) {
    refuse("offsets must rise from 0 to R = " + std::to_string(m.R));
  }
  if (!m.rows) return check_size("slots", slots, m.B);
  for (std::int64_t i = 0; i < m.B; ++i) {
    if (m.rows[i] >= -1 && m.rows[i] < slots) continue;
    refuse("rows must lie in [-1, " + std::to_string(slots) + "), got " + std::to_string(m.rows[i]) + " at " +
           std::to_string(i));
  }
}

}  // namespace

void mix(Address S, Address Z, std::int64_t z_stride, std::int64_t experts, int z_dtype, Address alpha,
         Address indices, Address rows, Address offsets, std::int64_t layers, Address out, std::int64_t out_stride,
         std::int64_t slots, std::int64_t B, std::int64_t K, std::int64_t R, int n_threads) {
  Mixing m{pointer<const float>(S),
           pointer<const float>(alpha),
           pointer<const char>(Z),
           pointer<const std::int32_t>(indices),
           pointer<const std::int32_t>(rows),
           pointer<const std::int64_t>(offsets),
           pointer<float>(out),
           z_stride,
           experts,
           layers,
           out_stride,
           B,
           K,
           R,
           (R + kTile - 1) / kTile,
           z_dtype};
  check(m, slots);
  const int team = useful_threads(n_threads, B * R * (K + 2) * bytes_of(z_dtype));
  run_team(
      team,
      [](const Member& me, void* context) {
        const Mixing& mixing = *static_cast<const Mixing*>(context);
        const Range part = share(mixing.B * mixing.tiles, 1, me.index, me.size);
        for (std::int64_t item = part.begin; item < part.end; ++item) {
          mix_tile(mixing, item / mixing.tiles, item % mixing.tiles * kTile);
        }
      },
      &m);
}

}  // namespace t2::cpu
