// The ops on the CPU, and all ops' schemas.
#include "../ops.h"

#include <memory>

#include "isa.h"
#include "tensors.h"

namespace nodeshape {

int interruption = 0;

namespace {

template <class T, class Model>
SolveResult run(const Common& common, const Model& model, ForwardKernel<Model, T> kernel, const Tensor& y0) {
  const Grid grid = common.grid();
  const int64_t samples = y0.size(0);
  Sizes sizes = sizes_of(y0);
  sizes.insert(sizes.begin(), grid.count);
  const Tensor ys = empty(sizes, dtype_of<T>());
  const Tensor stored = empty_stored(stored_sizes(common, y0), dtype_of<T>());
  const Tensor evaluations = empty({samples}, aoti_torch_dtype_int64());
  const Tensor residual = empty({samples}, aoti_torch_dtype_float64());
  const Tensor start = dense(y0);
  std::vector<Failure> failures(samples);
  const Interruptible interruptible(work_of(y0, grid));
  kernel(model,
         {grid, common.stage(), samples, common.store(), data<T>(start), data<T>(ys), data<T>(stored),
          data<int64_t>(evaluations), data<double>(residual), failures.data()},
         executor());
  interruptible.check();
  check_failures(first_failures(failures.data(), samples, false), samples, common.tolerance, common.drift_tolerance);
  return {ys, stored, evaluations, residual};
}

template <class T, class Model>
GradientResult run_backward(const Common& common, const Owner<Model>& owner, BackwardKernel<Model, T> kernel,
                            const Tensor& y0, const BackwardArguments& arguments) {
  const Grid grid = common.grid();
  const int64_t samples = y0.size(0);
  check_backward(common, y0, arguments);
  const Tensor grad_ys = dense(arguments.grad_ys), ys = dense(arguments.ys), stored = dense(arguments.stored);

  int64_t parameters = 0;
  for (const Tensor& x : owner.tensors) parameters += x.numel();
  const auto grad_parameters = std::make_unique_for_overwrite<T[]>(parameters);
  const Tensor grad_y0 = empty(sizes_of(y0), dtype_of<T>());
  const Tensor grad_t = empty({grid.count}, aoti_torch_dtype_float64());
  const Tensor evaluations = empty({samples}, aoti_torch_dtype_int64());
  std::vector<Failure> failures(samples);
  const Interruptible interruptible(work_of(y0, grid));
  kernel(owner.model,
         {grid, common.stage(), samples, adjoint_of(common), common.store(), common.drift_tolerance, data<T>(grad_ys),
          data<T>(ys), data<T>(stored), data<T>(grad_y0), data<double>(grad_t), grad_parameters.get(),
          data<int64_t>(evaluations), failures.data()},
         executor());
  interruptible.check();
  check_failures(first_failures(failures.data(), samples, true), samples, common.tolerance, common.drift_tolerance);

  return {grad_y0, grad_t, parted<T>(grad_parameters.get(), owner.tensors), evaluations};
}

struct Cpu {
  static constexpr int64_t kLargestSample = nodeshape::kLargestSample;

  static void check(const Common& common, const Tensor& y0) {
    NODESHAPE_CHECK(y0.is_cpu(), common.op, "y0 must be on the CPU");
  }

  static SolveResult solve(const Common& common, const ConvOwner& owner, const Tensor& y0) {
    const Kernels& k = kernels();
    return y0.scalar_type() == ScalarType::Float ? run<float>(common, owner.model, k.float32.conv_forward, y0)
                                                 : run<double>(common, owner.model, k.float64.conv_forward, y0);
  }
  static SolveResult solve(const Common& common, const MlpOwner& owner, const Tensor& y0) {
    const Kernels& k = kernels();
    return y0.scalar_type() == ScalarType::Float ? run<float>(common, owner.model, k.float32.mlp_forward, y0)
                                                 : run<double>(common, owner.model, k.float64.mlp_forward, y0);
  }

  static GradientResult solve_backward(const Common& common, const ConvOwner& owner, const Tensor& y0,
                                       const BackwardArguments& arguments) {
    const Kernels& k = kernels();
    return y0.scalar_type() == ScalarType::Float
               ? run_backward<float>(common, owner, k.float32.conv_backward, y0, arguments)
               : run_backward<double>(common, owner, k.float64.conv_backward, y0, arguments);
  }
  static GradientResult solve_backward(const Common& common, const MlpOwner& owner, const Tensor& y0,
                                       const BackwardArguments& arguments) {
    const Kernels& k = kernels();
    return y0.scalar_type() == ScalarType::Float
               ? run_backward<float>(common, owner, k.float32.mlp_backward, y0, arguments)
               : run_backward<double>(common, owner, k.float64.mlp_backward, y0, arguments);
  }
};

}  // namespace

/// For tests: the most threads that shared a solve's work since the last call.
extern "C" __attribute__((visibility("default"))) int64_t nodeshape_most_threads() {
  nodeshape::Company::forget();
  return nodeshape::most_threads.exchange(1);
}

/// From now on signals end solves, as callers that take solves anew want it.
extern "C" __attribute__((visibility("default"))) void nodeshape_let_signals_end_solves() {
  nodeshape::Interruptible::may_end() = true;
}

STABLE_TORCH_LIBRARY(nodeshape, m) {
  m.def(
      "conv_solve(Tensor y0, Tensor t, Tensor[] weights, int[] steps, float theta, float tolerance,"
      " int max_iterations, int adjoint, int checkpoint_every, float drift_tolerance) -> (Tensor ys, Tensor stages, "
      "Tensor evaluations, Tensor residual)");
  m.def(
      "conv_solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights,"
      " int[] steps, float theta, float tolerance, int max_iterations, int adjoint, int checkpoint_every, float "
      "drift_tolerance)"
      " -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor evaluations)");
  m.def(
      "mlp_solve(Tensor y0, Tensor t, Tensor[] weights, int activation, int[] steps, float theta, float tolerance,"
      " int max_iterations, int adjoint, int checkpoint_every, float drift_tolerance) -> (Tensor ys, Tensor stages, "
      "Tensor evaluations, Tensor residual)");
  m.def(
      "mlp_solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights,"
      " int activation, int[] steps, float theta, float tolerance, int max_iterations, int adjoint,"
      " int checkpoint_every, float drift_tolerance) -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor "
      "evaluations)");
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CPU, m) { NODESHAPE_REGISTER_OPS(m, Cpu); }

}  // namespace nodeshape
