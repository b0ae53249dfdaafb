// The solver of ConvDynamics of one instruction set and dtype; setup.py compiles this file once for each pair, with the
// instruction set's flags, NODESHAPE_TARGET and NODESHAPE_SCALAR.
#include "kernels.h"

#include "conv.h"
#include "solve.h"

#define NODESHAPE_JOIN_(a, b, c) a##b##_##c
#define NODESHAPE_JOIN(a, b, c) NODESHAPE_JOIN_(a, b, c)

namespace nodeshape {
namespace NODESHAPE_TARGET {

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

}  // namespace NODESHAPE_TARGET

using Scalar = NODESHAPE_SCALAR;
const ConvKernels<Scalar> NODESHAPE_JOIN(conv_, NODESHAPE_TARGET, NODESHAPE_SCALAR) = {
    NODESHAPE_TARGET::conv_forward<Scalar>, NODESHAPE_TARGET::conv_backward<Scalar>};

}  // namespace nodeshape
