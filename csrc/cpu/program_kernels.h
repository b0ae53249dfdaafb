// The solvers of programs of one instruction set, as the ops see them.
#pragma once

#include "../program.h"

namespace nodeshape {

template <class T>
struct ProgramKernelsOf {
  void (*forward)(const ProgramModel&, const ForwardProblem<T>&, const Executor&);
  void (*backward)(const ProgramModel&, const BackwardProblem<T>&, const Executor&);
};

struct ProgramKernels {
  const ProgramKernelsOf<float>& float32;
  const ProgramKernelsOf<double>& float64;
};

#if defined(__x86_64__)
extern const ProgramKernelsOf<float> program_avx512_float;
extern const ProgramKernelsOf<double> program_avx512_double;
extern const ProgramKernelsOf<float> program_avx2_float;
extern const ProgramKernelsOf<double> program_avx2_double;
#endif
extern const ProgramKernelsOf<float> program_portable_float;
extern const ProgramKernelsOf<double> program_portable_double;

}  // namespace nodeshape
