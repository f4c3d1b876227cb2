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
  require(c.n % chunk == 0 && c.r % chunk == 0, "a tensor-core form needs n and r in multiples of 8 (8-bit: 16)");
  constexpr std::int64_t LIMIT = 1 << 30;
  require(c.n < LIMIT && c.r < LIMIT && c.m < LIMIT && c.T < LIMIT / 16, "a tensor-core form takes sizes below 2^30");
  const auto aligned = [](const void* p) { return reinterpret_cast<Address>(p) % 16 == 0; };
  require(aligned(c.x) && aligned(c.U) && aligned(c.V) && aligned(c.work) && (c.T == 1 || c.x_stride % 8 == 0),
          "a tensor-core form needs x, its row stride, U, V and work on 16 bytes");
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

}  // namespace

std::string runtime_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

void svf_decode(Address x, std::int64_t x_stride, Address U, Address V, Address d, std::int64_t d_stride,
                std::int64_t slots, Address slot, Address base, Address bias, Address scale, Address y, Address h,
                Address work, Address barrier, std::int64_t T, std::int64_t n, std::int64_t r, std::int64_t m,
                int x_dtype, int w_dtype, int form, int tile, int device, Address stream) {
  require(T >= 0 && n > 0 && r > 0 && m > 0, "expected T >= 0 and n, r, m > 0");
  require_types(x_dtype, w_dtype);
  require(form >= kFma && form <= kMmaCooperative, "form must be one of 0, 1, 2 and 3");
  require(tile >= kByTokens && tile < kTileCodes, "tile must be one of 0 to 7");
  if (T == 0) return;
  require(x && U && V && y && work && d, "x, U, V, d, y and work must be given");
  require(form != kMmaCooperative || barrier, "the cooperative form needs barrier");
  DecodeCall c{};
  c.x = pointer<void>(x), c.U = pointer<void>(U), c.V = pointer<void>(V);
  c.d = pointer<float>(d), c.base = pointer<float>(base), c.scale = pointer<float>(scale);
  c.slot = pointer<std::int32_t>(slot), c.bias = pointer<void>(bias);
  c.y = pointer<void>(y), c.h = pointer<void>(h), c.work = pointer<void>(work);
  c.barrier = pointer<std::uint32_t>(barrier);
  c.x_stride = x_stride, c.d_stride = d_stride, c.slots = slots;
  c.T = T, c.n = n, c.r = r, c.m = m;
  c.form = form, c.tile = tile, c.device = device;
  c.stream = pointer<std::remove_pointer_t<cudaStream_t>>(stream);
  if (form != kFma) require_tensor_core_fit(c, x_dtype, w_dtype);
  const DeviceGuard guard(device);
  return form == kFma ? run_fma(c, x_dtype, w_dtype) : run_mma(c, x_dtype, w_dtype);
}

}  // namespace t2::cuda
