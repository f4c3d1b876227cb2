// Host side of the tensor-core kernel: the tile for so many tokens, the plan for this machine, the form of launch.
#pragma once

#include <limits>
#include <stdexcept>

#include "decode_mma.cuh"
#include "launch.cuh"
#include "svf_cuda.h"

namespace t2::cuda {

// Compute capability from which on a kernel can start before the one in front of it has ended.
constexpr int MIN_OVERLAP = 90;

inline int attribute_of(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline Machine read_machine(int device) {
  return {attribute_of(cudaDevAttrMultiProcessorCount, device),
          attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          10 * attribute_of(cudaDevAttrComputeCapabilityMajor, device) +
              attribute_of(cudaDevAttrComputeCapabilityMinor, device)};
}

inline const Machine& machine_of(int device) {
  static OncePerDevice<Machine> machines;
  return machines.of(device, [&] { return read_machine(device); });
}

template <typename Tile, typename Element, typename Weight>
struct MmaTile {
  static constexpr int STAGE_BYTES = SLICES * Stage<Tile, Element, Weight>::BYTES;
  static constexpr int STAGE_WEIGHT_BYTES = SLICES * Stage<Tile, Element, Weight>::WEIGHT_BYTES;
  static constexpr int ROWS = Tile::ROWS, TOKENS = Tile::TOKENS;

  static std::int64_t items(std::int64_t rows, std::int64_t tokens) {
    return (rows + Tile::ROWS - 1) / Tile::ROWS * ((tokens + Tile::TOKENS - 1) / Tile::TOKENS);
  }
  // For a launch of one phase with so many items, or of both.
  static Plan planned(int form, std::int64_t items, std::int64_t other_items, const Machine& machine) {
    const std::int64_t least = std::min(items, other_items), most = std::max(items, other_items);
    const bool beside = form == kMmaPdl && machine.capability >= MIN_OVERLAP;
    return plan(STAGE_BYTES, Tile::MEET_BYTES, least, most, beside, machine);
  }
  static bool fits(int form, const Machine& machine) { return planned(form, 1, 1, machine).stages != 0; }

  static MmaCall<Element, Weight> arguments(const DecodeCall& c) {
    MmaCall<Element, Weight> call{};
    call.project = {static_cast<const Element*>(c.x), c.x_stride, static_cast<const Weight*>(c.V), int(c.r), int(c.n)};
    std::int64_t after = 0;
    for (int i = 0; i < MAX_MEMBERS; ++i) {
      call.member[i].first_item = i < c.members ? int(after) : std::numeric_limits<int>::max();
      if (i >= c.members) continue;
      const DecodeMember& m = c.member[i];
      call.member[i].product = {static_cast<const Element*>(c.work) + m.column, c.r, static_cast<const Weight*>(m.U),
                                int(m.m), int(m.r)};
      call.member[i].finish = AddBias<Element>::of(m);
      after += items(m.m, c.T);
    }
    const std::int64_t first = items(c.r, c.T), most = std::numeric_limits<int>::max() / 2;
    if (first > most || after > most) throw std::invalid_argument("svf_decode: too many rows for one launch");
    call.items[0] = int(first), call.items[1] = int(after);
    call.tokens = int(c.T);
    call.scale = ScaleByDiagonal<Element, Element>::of(c);
    call.barrier = c.barrier;
    return call;
  }

  static void run(const DecodeCall& c, const Machine& machine) {
    const auto kernel = decode_mma_kernel<Tile, Element, Weight>;
    static OncePerDevice<bool> overlaps;
    const bool can_overlap = overlaps.of(c.device, [&] { return prepare(kernel, machine); });
    MmaCall<Element, Weight> call = arguments(c);
    cudaLaunchAttribute attribute = {};
    const auto start = [&](const char* what, const Plan& p, unsigned attributes) {
      if (p.stages == 0) throw std::runtime_error("t2kernels: svf_decode: too little shared memory for tensor cores");
      call.stages = p.stages;
      launch(kernel, what, {p.blocks, MMA_THREADS, p.shared_bytes, attribute, attributes}, c.stream, call);
    };
    if (c.form == kMmaCooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      call.last_phase = 1;
      return start("svf_decode (cooperative)", planned(c.form, call.items[0], call.items[1], machine), 1);
    }
    start("svf_decode (x V)", planned(c.form, call.items[0], call.items[0], machine), 0);
    call.first_phase = call.last_phase = 1;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    const unsigned attributes = c.form == kMmaPdl && can_overlap ? 1 : 0;
    start("svf_decode (h Uᵀ)", planned(c.form, call.items[1], call.items[1], machine), attributes);
  }

 private:
  template <typename Kernel>
  static void allow(Kernel kernel, cudaFuncAttribute attribute, int value) {
    check(cudaFuncSetAttribute(kernel, attribute, value), "cudaFuncSetAttribute");
  }

  // Once for a kernel on the current device: allows what any plan may want. Returns whether the kernel can wait for
  // the one before; compiled for less than sm_90 it has no instruction for that and must start after it.
  template <typename Kernel>
  static bool prepare(Kernel kernel, const Machine& machine) {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    allow(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
          machine.block_shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
    // A plan counts on all of the shared memory, also for the blocks of a kernel beside this one.
    allow(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    return machine.capability >= MIN_OVERLAP && attributes.ptxVersion >= MIN_OVERLAP;
  }
};

// use(MmaTile) with the tile that the call names, or else with one for so many tokens.
template <typename Element, typename Weight, typename Use>
void with_tile(const DecodeCall& c, const Machine& machine, Use use) {
  // 64-byte rows where 128 would leave too few stages: with 8-bit weights the activations take most of a stage.
  constexpr int BYTES = sizeof(Weight) == 1 ? 64 : 128;
  using Few = MmaTile<Tile<16, 8, 128>, Element, Weight>;
  using Some = MmaTile<Tile<32, 32, BYTES>, Element, Weight>;
  using Many = MmaTile<Tile<48, 64, 64>, Element, Weight>;
  switch (c.tile) {
    case k16x8: return use(Few{});
    case k32x8: return use(MmaTile<Tile<32, 8, 128>, Element, Weight>{});
    case k64x8: return use(MmaTile<Tile<64, 8, 128>, Element, Weight>{});
    case k32x32: return use(Some{});
    case k64x32: return use(MmaTile<Tile<64, 32, BYTES>, Element, Weight>{});
    case k32x64: return use(MmaTile<Tile<32, 64, 64>, Element, Weight>{});
    case k48x64: return use(Many{});
    default: break;
  }
  if (c.T <= Few::TOKENS) return use(Few{});
  if (c.T > Some::TOKENS && Many::fits(c.form, machine)) return use(Many{});
  use(Some{});
}

template <typename Element, typename Weight>
void decode_mma(const DecodeCall& c) {
  const Machine& machine = machine_of(c.device);
  with_tile<Element, Weight>(c, machine, [&](auto tile) { tile.run(c, machine); });
}

}  // namespace t2::cuda
