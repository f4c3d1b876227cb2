// Which instruction set runs: what the machine has, what was compiled, what T2_CPU_ISA or the caller asks for.
#include "select.h"

#include <cstdint>
#include <cstdlib>

#include "svf_cpu.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#define T2_X86 1
#endif

namespace t2::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
constexpr int kIsas = 4;

#ifdef T2_X86
// __builtin_cpu_supports("avx512bf16") needs a newer compiler than the kernels do, so cpuid is read directly.
std::uint64_t extended_control_register() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

bool machine_has(int isa) {
  if (isa == kScalar) return true;
  std::uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !fma || !f16c) return false;
  const std::uint64_t saved = extended_control_register();
  if ((saved & 0x6) != 0x6) return false;
  std::uint32_t b7, c7;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return false;
  if (isa == kAvx2) return b7 >> 5 & 1;
  const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
  if ((saved & 0xe6) != 0xe6 || !f || !dq || !bw || !vl) return false;
  if (isa == kAvx512) return true;
  const bool vbmi = c7 >> 1 & 1;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return vbmi && (a >> 5 & 1);
}
#else
bool machine_has(int isa) { return isa == kScalar; }
#endif

const KernelTable* compiled_table(int isa) {
  switch (isa) {
    case kScalar:
      return scalar_table();
    case kAvx2:
      return avx2_table();
    case kAvx512:
      return avx512_table();
    default:
      return avx512bf16_table();
  }
}

struct Tables {
  const KernelTable* usable[kIsas];
  int best;

  Tables() : usable{}, best(kScalar) {
    for (int i = 0; i < kIsas; ++i) {
      usable[i] = machine_has(i) ? compiled_table(i) : nullptr;
      if (usable[i]) best = i;
    }
  }
};

const Tables& tables() {
  static const Tables t;
  return t;
}

std::string usable_names() {
  std::string names;
  for (int i = kIsas - 1; i >= 0; --i) {
    if (!tables().usable[i]) continue;
    if (!names.empty()) names += ", ";
    names += kNames[i];
  }
  return names;
}

int from_environment() {
  const char* name = std::getenv("T2_CPU_ISA");
  return name && *name ? isa_code(name) : static_cast<int>(kAuto);
}

}  // namespace

const KernelTable& table(int isa) {
  if (isa == kAuto) {
    static const int wished = from_environment();
    isa = wished == kAuto ? tables().best : wished;
  }
  if (isa < 0 || isa >= kIsas) refuse("isa must be -1 (auto) or 0 to 3, got " + std::to_string(isa));
  const KernelTable* t = tables().usable[isa];
  if (!t) {
    refuse(std::string("isa: this machine or build cannot run \"") + kNames[isa] + "\"; it can run " + usable_names() +
           ". Change T2_CPU_ISA or leave it unset.");
  }
  return *t;
}

std::string isa_name(int isa) { return table(isa).name; }

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (int i = kIsas - 1; i >= 0; --i)
    if (tables().usable[i]) names.emplace_back(kNames[i]);
  return names;
}

int isa_code(const std::string& name) {
  if (name == "auto") return kAuto;
  for (int i = 0; i < kIsas; ++i)
    if (name == kNames[i]) return i;
  refuse("isa (or T2_CPU_ISA) must be one of auto, scalar, avx2, avx512, avx512bf16, got \"" + name + "\"");
}

}  // namespace t2::cpu
