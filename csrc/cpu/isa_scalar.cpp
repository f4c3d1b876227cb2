// Plain C++: eight lanes in an array, which compilers turn into whatever vectors the baseline has (SSE2, NEON).
#include "kernel_body.h"

namespace t2::cpu {
namespace {

struct Lanes {
  float v[8];
};

template <class WeightT, class XT>
struct Scalar {
  using Weight = WeightT;
  using Act = float;
  using X = XT;
  using Acc = Lanes;
  using WReg = Lanes;
  using AReg = Lanes;
  static constexpr int kStep = 8;
  static constexpr int kTokens = 2;

  static T2_INLINE Acc zero() { return Acc{}; }
  template <class T>
  static T2_INLINE Lanes load(const T* p, int count) {
    Lanes r{};
    for (int i = 0; i < count; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  static T2_INLINE WReg load_w(const Weight* p) { return load(p, kStep); }
  static T2_INLINE WReg load_w_tail(const Weight* p, int count) { return load(p, count); }
  static T2_INLINE AReg load_a(const Act* p) { return load(p, kStep); }
  static T2_INLINE AReg load_a_tail(const Act* p, int count) { return load(p, count); }
  static T2_INLINE Acc fma(Acc acc, const WReg& w, const AReg& a) {
    for (int i = 0; i < kStep; ++i) acc.v[i] += w.v[i] * a.v[i];
    return acc;
  }
  static T2_INLINE float sum(const Acc& a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
  }
  static T2_INLINE void sum4(const Acc& a, const Acc& b, const Acc& c, const Acc& d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
};

float read_stream(const void* data, std::int64_t bytes) {
  const float* p = static_cast<const float*>(data);
  float lanes[32] = {};
  for (std::int64_t i = 0; i + 32 <= bytes / 4; i += 32)
    for (int j = 0; j < 32; ++j) lanes[j] += p[i + j];
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

const KernelTable kTable = {
    "scalar",
    {kernel<Scalar<float, float>>(), kernel<Scalar<BF16, BF16>>(), kernel<Scalar<F16, F16>>()},
    {kernel<Scalar<std::int8_t, float>>(), kernel<Scalar<std::int8_t, BF16>>(), kernel<Scalar<std::int8_t, F16>>()},
    {kernel<Scalar<F8, float>>(), kernel<Scalar<F8, BF16>>(), kernel<Scalar<F8, F16>>()},
    {row_kernels<float>(), row_kernels<BF16>(), row_kernels<F16>()},
    read_stream,
};

}  // namespace

const KernelTable* scalar_table() { return &kTable; }

}  // namespace t2::cpu
