// The instructions that CUDA C++ has no name for, one function each. tests/cuda_emulation has the same functions in
// plain C++, so every other file here is the same on a GPU and in the tests.
#pragma once

#ifdef T2_CUDA_EMULATION
#include <emulated_ptx.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace t2::cuda {

// ---- Shared memory given at launch: the kernels name it by the offset in bytes ----

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 t2_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(t2_dynamic_shared);
}

__device__ __forceinline__ std::uint32_t shared_address(int offset) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(dynamic_shared())) + static_cast<std::uint32_t>(offset);
}

// Eight bytes, on 8.
__device__ __forceinline__ uint2 load_8(int offset) {
  return *reinterpret_cast<const uint2*>(dynamic_shared() + offset);
}

// ---- Copies from global to shared memory that land later ----

// Enqueue 16 bytes, or 16 zero bytes where `there` is false: then nothing is read, whatever `from` says.
__device__ __forceinline__ void copy_16(int offset, const void* from, bool there) {
  const std::uint32_t to = shared_address(offset);
  // .cg: through L2 only, so data that another block has just written is never taken from a stale L1.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// End a group of copies of this thread (it may be empty).
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most PENDING of this thread's latest groups have not landed. Other threads need a barrier after it.
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Tensor cores: the whole warp calls ----

// Four 8 x 8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8 (16 bytes of shared memory) and
// receives, of each matrix, elements 2 (l % 4) and the next one of row l / 4.
__device__ __forceinline__ void load_matrices(int row, std::uint32_t (&to)[4]) {
  const std::uint32_t from = shared_address(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// sum (16 x 8, fp32) += a (16 x 16) b (16 x 8). With g = lane / 4 and c = 2 (lane % 4), this lane holds, two
// elements a register, a: (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8); b: (c, g), (c + 8, g); sum: (g, c),
// (g, c + 1), (g + 8, c), (g + 8, c + 1).
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sum)[4], const std::uint32_t (&a)[4],
                                                            std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                                     std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a b + c, two bf16 in each, rounded once.
__device__ __forceinline__ std::uint32_t fma_bf16x2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  std::uint32_t sum;
  asm volatile("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// ---- Between kernels and between blocks ----

// The next kernel of the stream, if launched for it, may start now: it must not yet read what this one writes.
__device__ __forceinline__ void let_the_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Everything that the kernel before has written is there. Nothing to wait for where it has ended already.
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A read that sees, and orders behind it, what another block wrote before its own fence and atomic.
__device__ __forceinline__ std::uint32_t load_acquire(const std::uint32_t* from) {
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

// Ends the kernel, and the CUDA context, with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

}  // namespace t2::cuda

#endif
