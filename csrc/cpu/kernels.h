// The solvers of one instruction set, as the ops see them.
#pragma once

#include "../control.h"
#include "../model.h"

namespace nodeshape {

template <class T>
struct ConvKernels {
  void (*forward)(const ConvModel&, const ForwardProblem<T>&, const Executor&);
  void (*backward)(const ConvModel&, const BackwardProblem<T>&, const Executor&);
};

template <class T>
struct ProgramKernels {
  void (*forward)(const ProgramModel&, const ForwardProblem<T>&, const Executor&);
  void (*backward)(const ProgramModel&, const BackwardProblem<T>&, const Executor&);
  /// Elements that the tapes of `steps` steps take, or 0 where there are none, or unless `always` where storing states
  /// is better.
  int64_t (*tapes)(const ProgramModel&, int64_t samples, int64_t steps, bool always);
};

/// A program under error control.
struct AdaptiveModel {
  const Program& program;
  const void* const* weights;  // [weights], float or double
  Embedded method;
};

template <class T>
struct AdaptiveKernels {
  void (*forward)(const AdaptiveModel&, const AdaptiveProblem<T>&, const Executor&);
  void (*backward)(const AdaptiveModel&, const AdaptiveBackwardProblem<T>&, const Executor&);
};

template <class T>
struct KernelsOf {
  const ConvKernels<T>& conv;
  const ProgramKernels<T>& program;
  const AdaptiveKernels<T>& adaptive;
};

struct Kernels {
  const char* isa;
  KernelsOf<float> float32;
  KernelsOf<double> float64;

  template <class T>
  const KernelsOf<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return float32;
    else
      return float64;
  }
};

#define NODESHAPE_DECLARE_KERNELS(isa, type)                \
  extern const ConvKernels<type> conv_##isa##_##type;       \
  extern const ProgramKernels<type> program_##isa##_##type; \
  extern const AdaptiveKernels<type> adaptive_##isa##_##type
#if defined(__x86_64__)
NODESHAPE_DECLARE_KERNELS(avx512, float);
NODESHAPE_DECLARE_KERNELS(avx512, double);
NODESHAPE_DECLARE_KERNELS(avx2, float);
NODESHAPE_DECLARE_KERNELS(avx2, double);
#endif
NODESHAPE_DECLARE_KERNELS(portable, float);
NODESHAPE_DECLARE_KERNELS(portable, double);

}  // namespace nodeshape
