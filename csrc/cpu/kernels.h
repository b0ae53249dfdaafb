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
  KernelsOf<float> float32;
  KernelsOf<double> float64;
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

}  // namespace nodeshape
