// The solvers of one instruction set, as the ops see them.
#pragma once

#include "../problem.h"

namespace nodeshape {

/// GroupNorm-ReLU-Conv-GroupNorm-ReLU-Conv-GroupNorm; parameters in the order of ConvDynamics.state_dict().
struct ConvModel {
  int64_t channels, height, width, groups;
  const void* parameters[10];  // float or double
};

enum class Activation : int { tanh, relu, softplus, silu };

/// A chain of Linear layers; parameters in the order of MLPDynamics.state_dict().
struct MlpModel {
  int64_t dim;
  int64_t layers;
  const int64_t* widths;          // [layers], outputs of each layer; the last is dim
  const void* const* parameters;  // [2 * layers]: weight [out, in], bias [out]
  Activation activation;
};

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
