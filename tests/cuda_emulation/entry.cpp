// The launchers of csrc/cuda with a C interface for ctypes. Return 0, or 1 with the message in `error_text`.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <iterator>
#include <vector>

#include "grid_barrier.cuh"
#include "launch_mma.cuh"
#include "mix.h"
#include "svf_cuda.h"

using t2::cuda::Address;
using I64 = std::int64_t;

namespace {

template <typename Call>
int guarded(char* error_text, I64 error_size, Call call) {
  try {
    call();
    emulator::flush();
    return 0;
  } catch (const std::exception& problem) {
    std::snprintf(error_text, static_cast<std::size_t>(error_size), "%s", problem.what());
    return 1;
  }
}

// The first `come` blocks meet, the others do not come; each counts how many it has seen before and after.
void barrier_kernel(std::uint32_t* counters, int come, std::uint32_t looks, int* before, int* after) {
  if (static_cast<int>(blockIdx.x) >= come) return;
  if (threadIdx.x == 0) ++*before;
  t2::cuda::grid_barrier(counters, looks);
  if (threadIdx.x == 0) after[blockIdx.x] = *before;
}

}  // namespace

extern "C" int emulated_svf_decode(Address x, I64 x_stride, Address U, Address V, Address d, I64 d_stride, I64 slots,
                                   Address slot, Address base, Address bias, Address scale, Address y, Address h,
                                   Address work, Address barrier, I64 T, I64 n, I64 r, I64 m, I64 x_dtype, I64 w_dtype,
                                   I64 form, I64 tile, I64 device, Address stream, char* error_text, I64 error_size) {
  return guarded(error_text, error_size, [&] {
    t2::cuda::svf_decode(x, x_stride, U, V, d, d_stride, slots, slot, base, bias, scale, y, h, work, barrier, T, n, r,
                         m, static_cast<int>(x_dtype), static_cast<int>(w_dtype), static_cast<int>(form),
                         static_cast<int>(tile), static_cast<int>(device), stream);
  });
}

extern "C" int emulated_mix(Address S, Address Z, I64 z_stride, I64 experts, I64 z_dtype, Address alpha,
                            Address indices, Address rows, Address offsets, I64 layers, Address out, I64 out_stride,
                            I64 slots, I64 B, I64 K, I64 R, I64 device, Address stream, char* error_text,
                            I64 error_size) {
  return guarded(error_text, error_size, [&] {
    t2::cuda::mix(S, Z, z_stride, experts, static_cast<int>(z_dtype), alpha, indices, rows, offsets, layers, out,
                  out_stride, slots, B, K, R, static_cast<int>(device), stream);
  });
}

// `lists`: U, bias, y, r and m of the members, one after another.
extern "C" int emulated_svf_group(Address x, I64 x_stride, Address V, Address d, I64 d_stride, I64 slots, Address slot,
                                  Address base, Address scale, Address work, Address barrier, I64 T, I64 n,
                                  I64 x_dtype, I64 w_dtype, I64 form, I64 tile, I64 device, Address stream,
                                  const I64* lists, const I64* lengths, char* error_text, I64 error_size) {
  std::vector<I64> list[5];
  for (int i = 0; i < 5; lists += lengths[i], ++i) list[i].assign(lists, lists + lengths[i]);
  const auto addresses = [&](int i) { return std::vector<Address>(list[i].begin(), list[i].end()); };
  return guarded(error_text, error_size, [&] {
    t2::cuda::svf_group(x, x_stride, addresses(0), V, d, d_stride, slots, slot, base, addresses(1), scale, addresses(2),
                        work, barrier, T, n, list[3], list[4], static_cast<int>(x_dtype), static_cast<int>(w_dtype),
                        static_cast<int>(form), static_cast<int>(tile), static_cast<int>(device), stream);
  });
}

extern "C" int emulated_barrier(I64 blocks, I64 come, I64 looks, std::uint32_t* counters, int* before,
                                int* after, char* error_text, I64 error_size) {
  return guarded(error_text, error_size, [&] {
    t2::cuda::LaunchShape shape{blocks, 64};
    shape.attribute.id = cudaLaunchAttributeCooperative;
    shape.attribute.val.cooperative = 1;
    shape.attributes = 1;
    t2::cuda::launch(barrier_kernel, "barrier", shape, nullptr, counters, static_cast<int>(come),
                     static_cast<std::uint32_t>(looks), before, after);
  });
}

// How one launch of a tensor-core form, of the products with `rows` and `other_rows` rows, would fill the emulated
// machine: tile, stages, blocks, bytes, items.
extern "C" void emulated_plan(I64 T, I64 rows, I64 other_rows, I64 eight_bit, I64 form, I64* out) {
  t2::cuda::DecodeCall c{};
  c.T = T, c.form = static_cast<int>(form);
  const t2::cuda::Machine machine = t2::cuda::read_machine(emulator::device);
  const auto report = [&](auto tile) {
    const t2::cuda::Plan p = tile.planned(c.form, tile.items(rows, T), tile.items(other_rows, T), machine);
    const I64 values[] = {tile.ROWS,      tile.TOKENS,           p.stages,         p.per_multiprocessor, p.blocks,
                          p.shared_bytes, tile.STAGE_WEIGHT_BYTES, tile.items(rows, T), tile.items(other_rows, T)};
    std::copy(std::begin(values), std::end(values), out);
  };
  if (eight_bit != 0) {
    t2::cuda::with_tile<__nv_bfloat16, std::int8_t>(c, machine, report);
  } else {
    t2::cuda::with_tile<__nv_bfloat16, __nv_bfloat16>(c, machine, report);
  }
}
