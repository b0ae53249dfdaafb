// The solvers of programs of one instruction set and dtype; setup.py compiles this file as it does conv.cpp.
#include "kernels.h"

#include "program_dynamics.h"
#include "solve.h"
#include "../tableau.h"

#define NODESHAPE_JOIN_(a, b, c) a##b##_##c
#define NODESHAPE_JOIN(a, b, c) NODESHAPE_JOIN_(a, b, c)

namespace nodeshape {
namespace NODESHAPE_TARGET {

/// Vectors of samples that a tile takes: several hide what the weights cost to read, as long as the tile stays in the
/// cache and, where there is work to share out, enough tiles are left for it. It depends on the problem alone.
template <class T>
int64_t tile_vectors(const Program& program, int64_t samples) {
  constexpr int64_t kMostElements = (int64_t(1) << 19) / int64_t(sizeof(T));
  constexpr double kLittleWork = 32e3;  // operations per evaluation, of which a thread is not worth its wait
  int64_t vectors = 4;
  while (vectors > 1) {
    const int64_t tiles = program.operations > kLittleWork ? 4 : vectors == 4 ? 2 : 1;
    if (samples >= tiles * vectors * kLanes<T> && program.kept * vectors * kLanes<T> <= kMostElements) break;
    vectors /= 2;
  }
  return vectors;
}

/// Elements that the tapes of so many steps take, or 0 where stages are iterated or samples few; and unless `always`
/// where they are more work for the memory than evaluating f again.
template <class T>
int64_t tapes(const ProgramModel& model, int64_t samples, int64_t steps, bool always) {
  constexpr int64_t kMostBytes = 1 << 25;
  constexpr double kLeastWork = 8;  // operations per element
  if (!model.tableau.is_explicit() || are_few<T>(samples)) return 0;
  const int64_t width = tile_vectors<T>(model.program, samples) * kLanes<T>, slots = ceil_div(samples, width);
  const int64_t tape = Layers<T>::lay_out(model.program, nullptr);
  int64_t elements = tape, bytes;
  const int64_t counts[] = {slots, width, model.tableau.used_stages(), steps};
  for (const int64_t count : counts)
    if (__builtin_mul_overflow(elements, count, &elements)) return 0;
  if (__builtin_mul_overflow(elements, int64_t(sizeof(T)), &bytes)) return 0;
  const bool pays = bytes <= kMostBytes && model.program.operations >= kLeastWork * double(tape);
  return always || pays ? elements : 0;
}

/// Calls body.operator()<D>(weights) for the dynamics that suits: tiles unless stages are iterated or samples few.
template <class T, class Body>
void with_dynamics(const ProgramModel& model, int64_t samples, bool iterates, int64_t tapes, bool attached,
                   Body&& body) {
  const T* const* weights = reinterpret_cast<const T* const*>(model.weights);
  if (are_few<T>(samples)) return body.template operator()<ProgramRows<T>>({model.program, weights, tapes, 0, true});
  if (iterates) return body.template operator()<ProgramSamples<T>>({model.program, weights, tapes, 0, false});
  const int64_t vectors = tile_vectors<T>(model.program, samples);
  const ProgramWeights<T> tiles{model.program, weights, tapes, vectors, false, attached};
  if (vectors == 4) return body.template operator()<ProgramTile<T, 4>>(tiles);
  if (vectors == 2) return body.template operator()<ProgramTile<T, 2>>(tiles);
  return body.template operator()<ProgramTile<T, 1>>(tiles);
}

/// The same for the loop in theta, whose tiles are of one vector: it is not worth compiling for more.
template <class T, class Body>
void with_theta_dynamics(const ProgramModel& model, int64_t samples, bool iterates, Body&& body) {
  const T* const* weights = reinterpret_cast<const T* const*>(model.weights);
  if (are_few<T>(samples)) return body.template operator()<ProgramRows<T>>({model.program, weights, 1, 0, true});
  if (iterates) return body.template operator()<ProgramSamples<T>>({model.program, weights, 1, 0, false});
  return body.template operator()<ProgramTile<T, 1>>({model.program, weights, 1, 1, false});
}

template <class T>
void program_forward(const ProgramModel& model, const ForwardProblem<T>& problem, const Executor& executor) {
  const bool iterates = !model.tableau.is_explicit();
  if (problem.store > 0)
    return with_theta_dynamics<T>(model, problem.samples, iterates, [&]<class D>(const ProgramWeights<T>& weights) {
      forward<D>(weights, problem, executor);
    });
  with_dynamics<T>(model, problem.samples, iterates, 1, problem.store == kStoreTapes,
                   [&]<class D>(const ProgramWeights<T>& weights) {
                     forward_groups<D>(weights, problem, executor, [&](D& f, Arena& arena, Group group) {
                       TableauSolve<D, Arena>(f, arena, problem, model.tableau, group).run();
                     });
                   });
}

template <class T>
void program_backward(const ProgramModel& model, const BackwardProblem<T>& problem, const Executor& executor) {
  const bool iterates = !model.tableau.is_explicit();
  if (problem.adjoint != Adjoint::discrete)
    return with_theta_dynamics<T>(
        model, problem.samples, iterates || problem.adjoint == Adjoint::reversible,
        [&]<class D>(const ProgramWeights<T>& weights) { backward<D>(weights, problem, executor); });
  with_dynamics<T>(model, problem.samples, iterates, model.tableau.stages, problem.store == kStoreTapes,
                   [&]<class D>(const ProgramWeights<T>& weights) {
                     backward_groups<D>(weights, problem, executor,
                                        [&](D& f, Arena& arena, Group group, double* grad_t) {
                                          TableauSweep<D, Arena>(f, arena, problem, model.tableau, group, grad_t).run();
                                        });
                   });
}

}  // namespace NODESHAPE_TARGET

using Scalar = NODESHAPE_SCALAR;
const ProgramKernels<Scalar> NODESHAPE_JOIN(program_, NODESHAPE_TARGET, NODESHAPE_SCALAR) = {
    NODESHAPE_TARGET::program_forward<Scalar>, NODESHAPE_TARGET::program_backward<Scalar>,
    NODESHAPE_TARGET::tapes<Scalar>};

}  // namespace nodeshape
