// Error control: what a solve whose samples choose their steps is asked for, the same for every device and instruction
// set.
#pragma once

#include "program.h"

namespace nodeshape {

/// An explicit tableau whose last stage is the slope at the end of a step (a is b there, c is 1).
struct Embedded {
  Tableau tableau;
  const double* error;  // [stages], the error of a step is h sum_i error_i F_i
  const double* dense;  // [4, stages], of x, x^2, x^3, x^4: y + h sum_i w_i(x) F_i at the part x of a step
};

/// A sample's steps keep the root mean square of error / (atol + rtol max(|y|, |y'|)) to at most 1, and after a ratio r
/// are multiplied by safety r^(-1/order) (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, II.4).
struct Control {
  double rtol, atol;
  double first_step;  // 0 to choose it
  double min_step, max_step, safety, grow, shrink;
  int64_t order, most_attempts;
};

/// What became of a sample.
enum class Outcome : int64_t { arrived, too_many_attempts, too_small_steps, not_finite };

/// Memory for the next accepted steps of a chunk of samples, in the order in which they are accepted.
template <class T>
struct Slab {
  static constexpr int64_t kSteps = 256;
  T* states;        // [kSteps, sample], where a step starts
  double* spans;    // [kSteps, 2], its start and its end
  int64_t* before;  // [kSteps], the same sample's step before it, counted from the chunk's first, or -1
};

template <class T>
struct AdaptiveProblem {
  const double* times;  // [count], increasing or decreasing, at least 2
  int64_t count, samples;
  Control control;
  const T* y0;           // [samples, sample]
  T* ys;                 // [times, samples, sample]
  int64_t* accepted;     // [samples]
  int64_t* rejected;     // [samples]
  int64_t* evaluations;  // [samples]
  int64_t* outcomes;     // [samples], of Outcome
  double* failures;      // [samples, 2]: the time that a sample did not get past, its error in units of the tolerance
  int64_t* last;         // [samples], the step that ends where the sample ended, counted from its chunk's first; or -1
  void (*more)(void* context, int64_t chunk, Slab<T>* slab);  // null where no steps are recorded
  void* context;
};

/// As the forward solve left it, steps counted from the first of all.
template <class T>
struct AdaptiveBackwardProblem {
  const double* times;
  int64_t count, samples;
  const T* grad_ys;       // [times, samples, sample]
  const T* states;        // [steps, sample]
  const double* spans;    // [steps, 2]
  const int64_t* before;  // [steps]
  const int64_t* last;    // [samples]
  T* grad_y0;             // [samples, sample]
  T* grad_parameters;     // [parameters]
  int64_t* evaluations;   // [samples], of the vector-Jacobian product
};

/// Samples whose steps are recorded together.
NODESHAPE_SMALL int64_t samples_per_chunk(int64_t samples) {
  const int64_t share = (samples + 15) / 16;
  return share > 64 ? share : 64;
}

}  // namespace nodeshape
