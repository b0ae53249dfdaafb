// The CUDA solver, as its ops see it.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

#include "../model.h"
#include "../problem.h"
#include "../sizes.h"

namespace nodeshape::cuda {

/// The first failure that a device's solves left behind, in host memory that its kernels write to. No word is written
/// by both sides: a kernel's atomics do not exclude the host.
struct Report {
  int begun = 0;             // reports so far, counted by the kernel that goes on to write one
  volatile int written = 0;  // reports so far, counted by that kernel when it is done
  volatile int raised = 0;   // reports so far, counted by the host; fewer than begun while one waits
  FirstFailures failed;
  int64_t samples;
  double tolerance, drift_tolerance;
};

/// Where kernels run and what they may use.
struct Launch {
  cudaStream_t stream;
  std::function<void*(int64_t bytes)> scratch;  // device memory, valid for what is launched on the stream by now
  Report* report;

  /// Room for an array of the given sizes.
  template <class T>
  T* take(const Sizes& sizes) const {
    return static_cast<T*>(scratch(checked_bytes("working memory", sizes, sizeof(T))));
  }
};

/// The grid of a problem is in host memory, `failures` is ignored, everything else in device memory. Launches kernels
/// and returns; a sample that fails gives NaN and a report.
template <class Model, class T>
void forward(const Model& model, ForwardProblem<T> problem, const Launch& on);

/// As forward(); `gradients` are as many as the model has parameters, `problem.grad_parameters` is ignored.
template <class Model, class T>
void backward(const Model& model, BackwardProblem<T> problem, const std::vector<T*>& gradients, const Launch& on);

}  // namespace nodeshape::cuda
