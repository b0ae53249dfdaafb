// The solvers of one instruction set, as the ops see them.
#pragma once

#include "../model.h"
#include "../problem.h"

namespace nodeshape {

template <class Model, class T>
using ForwardKernel = void (*)(const Model&, const ForwardProblem<T>&, const Executor&);
template <class Model, class T>
using BackwardKernel = void (*)(const Model&, const BackwardProblem<T>&, const Executor&);

template <class T>
struct KernelsOf {
  ForwardKernel<ConvModel, T> conv_forward;
  BackwardKernel<ConvModel, T> conv_backward;
  ForwardKernel<MlpModel, T> mlp_forward;
  BackwardKernel<MlpModel, T> mlp_backward;
};

struct Kernels {
  const char* isa;
  const KernelsOf<float>& float32;
  const KernelsOf<double>& float64;
};

#if defined(__x86_64__)
extern const KernelsOf<float> kernels_avx512_float;
extern const KernelsOf<double> kernels_avx512_double;
extern const KernelsOf<float> kernels_avx2_float;
extern const KernelsOf<double> kernels_avx2_double;
#endif
extern const KernelsOf<float> kernels_portable_float;
extern const KernelsOf<double> kernels_portable_double;

}  // namespace nodeshape
