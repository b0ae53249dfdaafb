// What a solve is asked for: plain numbers and pointers, the same for every device and instruction set.
#pragma once

#include <cstdint>

/// What a function needs to run where the solve does: on CUDA, both sides of it.
#ifdef __CUDACC__
#define NODESHAPE_FUNCTION __host__ __device__
#else
#define NODESHAPE_FUNCTION
#endif
/// The same for a small function outside the targets' namespaces: were it not inlined, the linker would keep one
/// instruction set's copy for all.
#define NODESHAPE_SMALL NODESHAPE_FUNCTION __attribute__((always_inline)) inline

namespace nodeshape {

/// Equal steps between observation times: `steps[j]` of them from `times[j]` to `times[j + 1]`.
struct Grid {
  const double* times;   // [count], increasing or decreasing
  int64_t count;         // at least 1
  const int64_t* steps;  // [count - 1], each at least 1
  double theta;          // where in a step the stage lies: 0, 1/2 or 1

  NODESHAPE_SMALL int64_t total_steps() const {
    int64_t total = 0;
    for (int64_t j = 0; j + 1 < count; ++j) total += steps[j];
    return total;
  }
};

/// When a stage counts as solved.
struct StageOptions {
  double tolerance;  // on rms(Y - base - c F(Y)) / max(rms(Y), rms(base))
  int64_t max_iterations;
};

enum class Sweep : int { forward, reversed, transposed, augmented };

/// Why a sample could not be carried on; `step` < 0 if it could.
struct Failure {
  enum Kind : int { stage, drift };
  int64_t step = -1;  // counted in the order of the sweep
  Kind kind = stage;
  Sweep sweep = Sweep::forward;
  double t = 0, h = 0;  // of the step
  double residual = 0;  // relative residual of the stage, or relative drift
  int64_t evaluations = 0;
};

/// The samples that failed first.
struct FirstFailures {
  Failure worst;         // of sample number `first`
  int64_t first, count;  // `count` is 0 if none failed
  double residual;       // the largest of theirs
};

NODESHAPE_FUNCTION inline FirstFailures first_failures(const Failure* failures, int64_t samples, bool backward) {
  FirstFailures found{{}, -1, 0, 0};
  for (int64_t n = 0; n < samples; ++n) {
    const int64_t step = failures[n].step;
    if (step < 0) continue;
    if (found.first < 0 || (backward ? step > found.worst.step : step < found.worst.step))
      found = {failures[n], n, 0, 0};
  }
  for (int64_t n = 0; n < samples; ++n) {
    const Failure& failure = failures[n];
    if (failure.step < 0 || failure.step != found.worst.step || failure.kind != found.worst.kind ||
        failure.sweep != found.worst.sweep)
      continue;
    ++found.count;
    if (!(failure.residual <= found.residual)) found.residual = failure.residual;
  }
  return found;
}

enum class Adjoint : int { discrete, reversible, continuous };

/// Arrays of a forward solve. `sample` below counts the elements of one sample.
template <class T>
struct ForwardProblem {
  Grid grid;
  StageOptions stage;
  int64_t samples;
  int64_t store;         // kStore..., or m > 0: the state after every m-th step of an interval
  const T* y0;           // [samples, sample]
  T* ys;                 // [times, samples, sample]
  T* stored;             // [stored, samples, sample], channels last; a stage of ConvDynamics is kConvMapsKept samples;
                         // tapes as TapedDynamics lay them out, [steps, used stages, slots]
  int64_t* evaluations;  // [samples]
  double* residual;      // [samples], the largest of all stages
  Failure* failures;     // [samples]
};

inline constexpr int64_t kStoreNothing = 0;
inline constexpr int64_t kStoreStages = -1;
/// All that the backward pass reads of the evaluations of a step, so that none is made again.
inline constexpr int64_t kStoreTapes = -2;
/// Maps that `stored` holds for a stage of ConvDynamics: the stage and both convolutions' outputs. Other dynamics keep
/// the stage alone.
inline constexpr int64_t kConvMapsKept = 3;

/// Rows of `stored` that an interval of `steps` steps fills; its last state is an observation anyway.
NODESHAPE_SMALL int64_t stored_rows(int64_t store, int64_t steps) {
  if (store == kStoreStages) return steps;
  return store > 0 ? (steps - 1) / store : 0;
}

NODESHAPE_SMALL int64_t stored_rows(int64_t store, const Grid& grid) {
  int64_t rows = 0;
  for (int64_t j = 0; j + 1 < grid.count; ++j) rows += stored_rows(store, grid.steps[j]);
  return rows;
}

/// Arrays of a backward sweep.
template <class T>
struct BackwardProblem {
  Grid grid;
  StageOptions stage;
  int64_t samples;
  Adjoint adjoint;
  int64_t store;           // as in the forward solve
  double drift_tolerance;  // reversible: on rms(rebuilt - stored) / max(rms(stored), rms(interval's end))
  const T* grad_ys;        // [times, samples, sample]
  const T* ys;             // [times, samples, sample]
  const T* stored;         // as the forward solve left it
  T* grad_y0;              // [samples, sample]
  double* grad_t;          // [times]
  T* grad_parameters;      // [parameters], all of them in one row
  int64_t* evaluations;    // [samples], of f and of its vector-Jacobian product
  Failure* failures;       // [samples]
};

/// Runs `task(i, context)` for i in [0, tasks), in any order and on any thread.
struct Executor {
  int64_t threads;
  void (*run)(int64_t tasks, void (*task)(int64_t, void*), void* context);
  /// Told how long threads took together, and how long one would have taken; in nanoseconds. May be null.
  void (*judge)(double together, double alone) = nullptr;
};

}  // namespace nodeshape
