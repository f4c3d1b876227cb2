// From addresses and type codes to typed launches.
#include "svf_cuda.h"

#include "decode.h"
#include "launch.cuh"

namespace t2::cuda {
namespace {

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("svf_decode: ") + message);
}

void require_types(int x_dtype, int w_dtype) {
  require(w_dtype == x_dtype || w_dtype == kI8 || w_dtype == kF8, "expected w_dtype equal to x_dtype, int8 or fp8");
  if (x_dtype == kF32 || x_dtype == kBF16 || x_dtype == kF16) return;
  throw std::invalid_argument("svf_decode: x_dtype must be fp32 (0), bf16 (1) or fp16 (2), got " +
                              std::to_string(x_dtype));
}

// What the tensor-core kernel's 16-byte copies need; it has no other way to load.
void require_tensor_core_fit(const DecodeCall& c, int x_dtype, int w_dtype) {
  require(x_dtype != kF32 && (w_dtype == x_dtype || x_dtype == kBF16),
          "a tensor-core form needs bf16 or fp16 x with factors of its dtype, or bf16 x with 8-bit factors");
  const std::int64_t chunk = w_dtype == x_dtype ? 8 : 16;
  constexpr std::int64_t LIMIT = 1 << 30;
  const auto aligned = [](const void* p) { return reinterpret_cast<Address>(p) % 16 == 0; };
  bool whole = c.n % chunk == 0, small = c.n < LIMIT && c.r < LIMIT && c.T < LIMIT / 16;
  bool placed = aligned(c.x) && aligned(c.V) && aligned(c.work) && (c.T == 1 || c.x_stride % 8 == 0);
  for (int i = 0; i < c.members; ++i) {
    const DecodeMember& m = c.member[i];
    whole = whole && m.r % chunk == 0;
    small = small && m.m < LIMIT;
    placed = placed && aligned(m.U);
  }
  require(whole, "a tensor-core form needs n and r in multiples of 8 (8-bit: 16)");
  require(small, "a tensor-core form takes sizes below 2^30");
  require(placed, "a tensor-core form needs x, its row stride, U, V and work on 16 bytes");
}

template <typename Element>
void run_fma(const DecodeCall& c, int w_dtype) {
  if (w_dtype == kI8) return decode<Element, std::int8_t>(c);
  if (w_dtype == kF8) return decode<Element, E4M3>(c);
  return decode<Element, Element>(c);
}

void run_fma(const DecodeCall& c, int x_dtype, int w_dtype) {
  if (x_dtype == kF32) return run_fma<float>(c, w_dtype);
  if (x_dtype == kBF16) return run_fma<__nv_bfloat16>(c, w_dtype);
  return run_fma<__half>(c, w_dtype);
}

void run_mma(const DecodeCall& c, int x_dtype, int w_dtype) {
  if (x_dtype == kF16) return decode_mma<__half, __half>(c);
  if (w_dtype == kI8) return decode_mma<__nv_bfloat16, std::int8_t>(c);
  if (w_dtype == kF8) return decode_mma<__nv_bfloat16, E4M3>(c);
  return decode_mma<__nv_bfloat16, __nv_bfloat16>(c);
}

// A call without its members.
DecodeCall call_over(Address x, std::int64_t x_stride, Address V, Address d, std::int64_t d_stride, std::int64_t slots,
                     Address slot, Address base, Address scale, Address work, Address barrier, std::int64_t T,
                     std::int64_t n, int form, int tile, int device, Address stream) {
  DecodeCall c{};
  c.x = pointer<void>(x), c.V = pointer<void>(V), c.work = pointer<void>(work);
  c.d = pointer<float>(d), c.base = pointer<float>(base), c.scale = pointer<float>(scale);
  c.slot = pointer<std::int32_t>(slot), c.barrier = pointer<std::uint32_t>(barrier);
  c.x_stride = x_stride, c.d_stride = d_stride, c.slots = slots, c.T = T, c.n = n;
  c.form = form, c.tile = tile, c.device = device;
  c.stream = pointer<std::remove_pointer_t<cudaStream_t>>(stream);
  return c;
}

// The next member; its columns of V and work follow those of the one before.
void add_member(DecodeCall& c, Address U, Address bias, Address y, std::int64_t r, std::int64_t m) {
  require(r > 0 && m > 0, "expected T >= 0 and n, r, m > 0");
  require(c.T == 0 || (U && y), "x, U, V, d, y and work must be given");
  c.member[c.members++] = {pointer<void>(U), pointer<void>(bias), pointer<void>(y), r, m, c.r};
  c.r += r;
}

void run(const DecodeCall& c, int x_dtype, int w_dtype) {
  require(c.T >= 0 && c.n > 0, "expected T >= 0 and n, r, m > 0");
  require_types(x_dtype, w_dtype);
  require(c.form >= kFma && c.form <= kMmaCooperative, "form must be one of 0, 1, 2 and 3");
  require(c.tile >= kByTokens && c.tile < kTileCodes, "tile must be one of 0 to 7");
  if (c.T == 0) return;
  require(c.x && c.V && c.work && c.d, "x, U, V, d, y and work must be given");
  require(c.form != kMmaCooperative || c.barrier, "the cooperative form needs barrier");
  if (c.form != kFma) require_tensor_core_fit(c, x_dtype, w_dtype);
  const DeviceGuard guard(c.device);
  return c.form == kFma ? run_fma(c, x_dtype, w_dtype) : run_mma(c, x_dtype, w_dtype);
}

}  // namespace

std::string runtime_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::uint64_t capture(int device, Address stream) {
  const DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(pointer<std::remove_pointer_t<cudaStream_t>>(stream), &status, &id),
        "cudaStreamGetCaptureInfo");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

void svf_decode(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                Address work, Address barrier, std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m,
                int x_dtype, int w_dtype, int form, int tile, int device, Address stream) {
  DecodeCall c = call_over(x, x_stride, V, d, d_stride, slots, slot, base, scale, work, barrier, T, n, form, tile, device,
                           stream);
  c.h = pointer<void>(h);
  add_member(c, U, bias, y, r, m);
  run(c, x_dtype, w_dtype);
}

void svf_group(Address x, std::int64_t x_stride, const std::vector<Address>& U, Address V, Address d,
               std::int64_t d_stride, std::int64_t slots, Address slot, Address base, const std::vector<Address>& bias,
               Address scale, const std::vector<Address>& y, Address work, Address barrier, std::int64_t T,
               std::int64_t n, const std::vector<std::int64_t>& r, const std::vector<std::int64_t>& m, int x_dtype,
               int w_dtype, int form, int tile, int device, Address stream) {
  const std::size_t members = U.size();
  require(members >= 1 && members <= MAX_MEMBERS, "a group has 1 to 4 members");
  require(bias.size() == members && y.size() == members && r.size() == members && m.size() == members,
          "U, bias, y, r and m must have one entry for each member of the group");
  DecodeCall c = call_over(x, x_stride, V, d, d_stride, slots, slot, base, scale, work, barrier, T, n, form, tile, device,
                           stream);
  for (std::size_t i = 0; i < members; ++i) add_member(c, U[i], bias[i], y[i], r[i], m[i]);
  run(c, x_dtype, w_dtype);
}

}  // namespace t2::cuda
