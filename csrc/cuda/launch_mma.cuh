// Host side of the tensor-core kernel: the tile for so many tokens, the plan for this machine, the form of launch.
#pragma once

#include <stdexcept>

#include "decode_mma.cuh"
#include "launch.cuh"
#include "svf_cuda.h"

namespace t2::cuda {

inline int attribute_of(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline Machine machine_of(int device) {
  return {attribute_of(cudaDevAttrMultiProcessorCount, device),
          attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          10 * attribute_of(cudaDevAttrComputeCapabilityMajor, device) +
              attribute_of(cudaDevAttrComputeCapabilityMinor, device)};
}

// 64-byte rows where 128 would leave too few stages: with int8 weights the activations take most of a stage.
template <typename Weight>
using FewTokens = Tile<16, 8, 128>;
template <typename Weight>
using SomeTokens = Tile<32, 32, sizeof(Weight) == 1 ? 64 : 128>;
template <typename Weight>
using ManyTokens = Tile<48, 64, 64>;

template <typename Tile, typename Element, typename Weight>
struct MmaTile {
  static constexpr int STAGE_BYTES = SLICES * Stage<Tile, Element, Weight>::BYTES;

  static std::int64_t items(std::int64_t rows, std::int64_t tokens) {
    return (rows + Tile::ROWS - 1) / Tile::ROWS * ((tokens + Tile::TOKENS - 1) / Tile::TOKENS);
  }
  static Plan planned(const DecodeCall& c, const Machine& machine) {
    const std::int64_t most = std::max(items(c.r, c.T), items(c.m, c.T));
    return plan(STAGE_BYTES, Tile::MEET_BYTES, most, c.form == kMmaPdl, machine);
  }
  static bool fits(const DecodeCall& c, const Machine& machine) { return planned(c, machine).stages != 0; }

  static void run(const DecodeCall& c, const Machine& machine) {
    const Plan p = planned(c, machine);
    if (p.stages == 0) throw std::runtime_error("t2kernels: svf_decode: too little shared memory for tensor cores");
    const auto kernel = decode_mma_kernel<Tile, Element, Weight>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes),
          "cudaFuncSetAttribute");
    MmaCall<Element, Weight> call{
        {{static_cast<const Element*>(c.x), c.x_stride, static_cast<const Weight*>(c.V), int(c.r), int(c.n)},
         {static_cast<const Element*>(c.work), c.r, static_cast<const Weight*>(c.U), int(c.m), int(c.r)}},
        int(c.T),
        ScaleByDiagonal<Element, Element>::of(c),
        AddBias<Element>::of(c),
        c.barrier,
        0,
        1,
        p.stages};
    LaunchShape shape{p.blocks, MMA_THREADS, p.shared_bytes, {}, 0};
    if (c.form == kMmaCooperative) {
      shape.attribute.id = cudaLaunchAttributeCooperative;
      shape.attribute.val.cooperative = 1;
      shape.attributes = 1;
      return launch(kernel, "svf_decode (cooperative)", shape, c.stream, call);
    }
    const auto one_phase = [&](const char* what, int phase, std::int64_t rows) {
      call.first_phase = call.last_phase = phase;
      shape.blocks = std::min<std::int64_t>(p.blocks, items(rows, c.T));
      launch(kernel, what, shape, c.stream, call);
    };
    one_phase("svf_decode (x V)", 0, c.r);
    if (c.form == kMmaPdl && waits_for_the_kernel_before(kernel, machine)) {
      shape.attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      shape.attribute.val.programmaticStreamSerializationAllowed = 1;
      shape.attributes = 1;
    }
    one_phase("svf_decode (h Uᵀ)", 1, c.m);
  }

 private:
  // A kernel compiled for less than sm_90 has no instruction to wait with; it must start after the one before.
  template <typename Kernel>
  static bool waits_for_the_kernel_before(Kernel kernel, const Machine& machine) {
    if (machine.capability < 90) return false;
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return attributes.ptxVersion >= 90;
  }
};

// The tile changes the speed, never a bit.
template <typename Element, typename Weight>
void decode_mma(const DecodeCall& c) {
  const Machine machine = machine_of(c.device);
  using Many = MmaTile<ManyTokens<Weight>, Element, Weight>;
  if (c.T <= FewTokens<Weight>::TOKENS) return MmaTile<FewTokens<Weight>, Element, Weight>::run(c, machine);
  if (c.T > SomeTokens<Weight>::TOKENS && Many::fits(c, machine)) return Many::run(c, machine);
  MmaTile<SomeTokens<Weight>, Element, Weight>::run(c, machine);
}

}  // namespace t2::cuda
