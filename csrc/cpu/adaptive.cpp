// Programs under error control, of one instruction set and dtype; setup.py compiles this file as it does conv.cpp.
#include "adaptive.h"
#include "program_dynamics.h"
#include "kernels.h"
#include "solve.h"

#define NODESHAPE_JOIN_(a, b, c) a##b##_##c
#define NODESHAPE_JOIN(a, b, c) NODESHAPE_JOIN_(a, b, c)

namespace nodeshape {
namespace NODESHAPE_TARGET {

/// Calls body.operator()<D>(weights, slots) for the dynamics that suits: several places for each lane, so that a sample
/// of many steps does not keep the others waiting.
template <class T, class Body>
void with_places(const AdaptiveModel& model, int64_t samples, int64_t tapes, Body&& body) {
  constexpr int64_t kMostElements = (int64_t(1) << 19) / int64_t(sizeof(T));
  const T* const* weights = reinterpret_cast<const T* const*>(model.weights);
  if (are_few<T>(samples))
    return body.template operator()<ProgramRows<T>>({model.program, weights, tapes, 0, true}, int(samples));
  const int64_t together = smaller(samples, samples_per_chunk(samples));
  if (together >= 4 * kLanes<T> && model.program.kept * 2 * kLanes<T> <= kMostElements)
    return body.template operator()<ProgramTile<T, 2>>({model.program, weights, tapes, 2, false}, 1);
  return body.template operator()<ProgramTile<T, 1>>({model.program, weights, tapes, 1, false}, 1);
}

/// Threads that a solve is worth, of which nobody knows how long it will be.
template <class W>
Executor suitable(const W& weights, int64_t slots, int64_t stages, const Executor& all) {
  constexpr double kSteps = 20;
  return {worthwhile(weights, double(slots) * double(stages) * kSteps, all.threads), all.run, all.judge};
}

template <class T>
void adaptive_forward(const AdaptiveModel& model, const AdaptiveProblem<T>& problem, const Executor& all) {
  const int64_t per_chunk = samples_per_chunk(problem.samples);
  with_places<T>(model, problem.samples, 1, [&]<class D>(const ProgramWeights<T>& weights, int slots) {
    const Executor executor =
        suitable(weights, ceil_div(problem.samples, D::kSamples), model.method.tableau.stages, all);
    share(executor, ceil_div(problem.samples, per_chunk), [&](int64_t chunk, Arena& arena) {
      D f(weights, arena, slots, false);
      const int64_t first = chunk * per_chunk;
      AdaptiveSolve<D>(f, arena, problem, model.method, slots, chunk, first,
                       smaller(per_chunk, problem.samples - first))
          .run();
    });
  });
}

template <class T>
void adaptive_backward(const AdaptiveModel& model, const AdaptiveBackwardProblem<T>& problem, const Executor& all) {
  const int64_t per_chunk = samples_per_chunk(problem.samples), chunks = ceil_div(problem.samples, per_chunk);
  const int64_t parameters = model.program.parameters(), stages = model.method.tableau.stages;
  with_places<T>(model, problem.samples, stages, [&]<class D>(const ProgramWeights<T>& weights, int slots) {
    const Executor executor = suitable(weights, ceil_div(problem.samples, D::kSamples), 3 * stages, all);
    Arena shared;
    T* rows = shared.take<T>(chunks * parameters);
    share(executor, chunks, [&](int64_t chunk, Arena& arena) {
      D f(weights, arena, slots, true);
      const int64_t first = chunk * per_chunk;
      AdaptiveSweep<D>(f, arena, problem, model.method, slots, first, smaller(per_chunk, problem.samples - first))
          .run();
      f.take_gradient(rows + chunk * parameters);
    });
    sum_chunks(executor, chunks, parameters, rows, problem.grad_parameters);
  });
}

}  // namespace NODESHAPE_TARGET

using Scalar = NODESHAPE_SCALAR;
const AdaptiveKernels<Scalar> NODESHAPE_JOIN(adaptive_, NODESHAPE_TARGET, NODESHAPE_SCALAR) = {
    NODESHAPE_TARGET::adaptive_forward<Scalar>, NODESHAPE_TARGET::adaptive_backward<Scalar>};

}  // namespace nodeshape
