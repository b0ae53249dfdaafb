// Which instruction set to run.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace nodeshape {
namespace {

struct Candidate {
  Kernels kernels;
  bool supported;
};

#define NODESHAPE_KERNELS_OF(isa, type) {conv_##isa##_##type, program_##isa##_##type, adaptive_##isa##_##type}
#define NODESHAPE_KERNELS(isa) \
  Kernels { #isa, NODESHAPE_KERNELS_OF(isa, float), NODESHAPE_KERNELS_OF(isa, double) }

const Candidate& chosen() {
  // Widest first. The compiler's builtins ask the processor and, for its registers, the operating system.
#if defined(__x86_64__) && !defined(NODESHAPE_PORTABLE)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  static const Candidate candidates[] = {
      {NODESHAPE_KERNELS(avx512), avx512}, {NODESHAPE_KERNELS(avx2), avx2}, {NODESHAPE_KERNELS(portable), true}};
#else
  static const Candidate candidates[] = {{NODESHAPE_KERNELS(portable), true}};
#endif
  const char* forced = std::getenv("NODESHAPE_ISA");
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (forced == nullptr || *forced == '\0') {
      if (candidate.supported) return candidate;
      continue;
    }
    if (candidate.kernels.isa == std::string(forced)) {
      if (candidate.supported) return candidate;
      throw std::runtime_error(std::string("NODESHAPE_ISA=") + forced + ": this processor does not have it; unset it");
    }
    known += std::string(known.empty() ? "" : ", ") + candidate.kernels.isa;
  }
  throw std::runtime_error(std::string("NODESHAPE_ISA=") + forced + " is not known here: choose one of " + known);
}

}  // namespace

const Kernels& kernels() { return chosen().kernels; }

}  // namespace nodeshape
