// The solvers of programs of one instruction set, as the ops see them.
#pragma once

#include "../control.h"

namespace nodeshape {

/// A program under error control.
struct AdaptiveModel {
  const Program& program;
  const void* const* weights;  // [weights], float or double
  Embedded method;
};

template <class T>
struct AdaptiveKernelsOf {
  void (*forward)(const AdaptiveModel&, const AdaptiveProblem<T>&, const Executor&);
  void (*backward)(const AdaptiveModel&, const AdaptiveBackwardProblem<T>&, const Executor&);
};

template <class T>
struct ProgramKernelsOf {
  void (*forward)(const ProgramModel&, const ForwardProblem<T>&, const Executor&);
  void (*backward)(const ProgramModel&, const BackwardProblem<T>&, const Executor&);
  /// Elements that the tapes of `steps` steps take, or 0 where there are none, or unless `always` where storing states
  /// is better.
  int64_t (*tapes)(const ProgramModel&, int64_t samples, int64_t steps, bool always);
};

struct ProgramKernels {
  const ProgramKernelsOf<float>& float32;
  const ProgramKernelsOf<double>& float64;
};

struct AdaptiveKernels {
  const AdaptiveKernelsOf<float>& float32;
  const AdaptiveKernelsOf<double>& float64;
};

#if defined(__x86_64__)
extern const ProgramKernelsOf<float> program_avx512_float;
extern const ProgramKernelsOf<double> program_avx512_double;
extern const AdaptiveKernelsOf<float> adaptive_avx512_float;
extern const AdaptiveKernelsOf<double> adaptive_avx512_double;
extern const ProgramKernelsOf<float> program_avx2_float;
extern const ProgramKernelsOf<double> program_avx2_double;
extern const AdaptiveKernelsOf<float> adaptive_avx2_float;
extern const AdaptiveKernelsOf<double> adaptive_avx2_double;
#endif
extern const ProgramKernelsOf<float> program_portable_float;
extern const ProgramKernelsOf<double> program_portable_double;
extern const AdaptiveKernelsOf<float> adaptive_portable_float;
extern const AdaptiveKernelsOf<double> adaptive_portable_double;

}  // namespace nodeshape
