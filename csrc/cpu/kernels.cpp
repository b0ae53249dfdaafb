// The solvers of one instruction set; setup.py compiles this file once for each, with its flags and NODESHAPE_TARGET.
#include "kernels.h"

#include "conv.h"
#include "mlp.h"
#include "mlp_tile.h"
#include "solve.h"

#define NODESHAPE_JOIN_(a, b) a##b
#define NODESHAPE_JOIN(a, b) NODESHAPE_JOIN_(a, b)
#define NODESHAPE_STRING_(a) #a
#define NODESHAPE_STRING(a) NODESHAPE_STRING_(a)

namespace nodeshape {
namespace NODESHAPE_TARGET {

/// Calls body.operator()<A>() for the activation.
template <class Body>
void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::tanh:
      return body.template operator()<Activation::tanh>();
    case Activation::relu:
      return body.template operator()<Activation::relu>();
    case Activation::softplus:
      return body.template operator()<Activation::softplus>();
    case Activation::silu:
      return body.template operator()<Activation::silu>();
  }
}

template <class T>
void conv_forward(const ConvModel& model, const ForwardProblem<T>& problem, const Executor& executor) {
  Arena arena;
  const ConvWeights<T> weights(model, arena, executor, false);
  forward<ConvDynamics<T>>(weights, problem, executor);
}

template <class T>
void conv_backward(const ConvModel& model, const BackwardProblem<T>& problem, const Executor& executor) {
  Arena arena;
  const ConvWeights<T> weights(model, arena, executor, true);
  backward<ConvDynamics<T>>(weights, problem, executor);
}

template <class T>
void mlp_forward(const MlpModel& model, const ForwardProblem<T>& problem, const Executor& executor) {
  const MlpTileWeights<T> tile{model};
  if (tile.suits(problem.grid.theta))
    return with_activation(model.activation, [&]<Activation A>() { forward<MlpTile<T, A>>(tile, problem, executor); });
  Arena arena;
  const MlpWeights<T> weights(model, arena);
  with_activation(model.activation, [&]<Activation A>() { forward<MlpDynamics<T, A>>(weights, problem, executor); });
}

template <class T>
void mlp_backward(const MlpModel& model, const BackwardProblem<T>& problem, const Executor& executor) {
  const MlpTileWeights<T> tile{model};
  if (tile.suits(problem.grid.theta) && problem.adjoint != Adjoint::reversible)  // which would iterate its stages
    return with_activation(model.activation, [&]<Activation A>() { backward<MlpTile<T, A>>(tile, problem, executor); });
  Arena arena;
  const MlpWeights<T> weights(model, arena);
  with_activation(model.activation, [&]<Activation A>() { backward<MlpDynamics<T, A>>(weights, problem, executor); });
}

template <class T>
inline constexpr KernelsOf<T> kernels_of = {conv_forward<T>, conv_backward<T>, mlp_forward<T>, mlp_backward<T>};

}  // namespace NODESHAPE_TARGET

const Kernels NODESHAPE_JOIN(kernels_, NODESHAPE_TARGET) = {
    NODESHAPE_STRING(NODESHAPE_TARGET), NODESHAPE_TARGET::kernels_of<float>, NODESHAPE_TARGET::kernels_of<double>};

}  // namespace nodeshape
