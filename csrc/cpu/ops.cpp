// The ops on the CPU, and their schemas.
#include <memory>

#include "dispatch.h"
#include "tensors.h"

namespace nodeshape {

int interruption = 0;

namespace {

struct Cpu {
  static constexpr int64_t kLargestSample = nodeshape::kLargestSample;

  static void check(const Common& common, const char* name, const Tensor& y0) {
    NODESHAPE_CHECK(y0.is_cpu(), common.op, std::string(name) + " must be on the CPU");
  }

  /// Stores states, or if the caller leaves it to the kernels their tapes, in one dimension.
  template <class T>
  static SolveResult run(const Common& common, const ProgramOwner& owner, const Tensor& y0, int64_t kept_per_step) {
    const Grid grid = common.grid();
    const int64_t samples = y0.size(0);
    Sizes sizes = sizes_of(y0);
    sizes.insert(sizes.begin(), grid.count);
    const int64_t taped = tapes<T>(owner, common, samples, kept_per_step);
    const Sizes kept = taped > 0 ? Sizes{taped} : owner.stored(common, y0);
    const Tensor ys = empty(sizes, dtype_of<T>());
    const Tensor stored = empty_stored(kept, dtype_of<T>());
    const Tensor evaluations = empty({samples}, aoti_torch_dtype_int64());
    const Tensor residual = empty({samples}, aoti_torch_dtype_float64());
    const Tensor start = dense(y0);
    std::vector<Failure> failures(samples);
    const Interruptible interruptible(work_of(y0, grid));
    dispatch_forward<T>(
        owner,
        {grid, common.stage(), samples, taped > 0 ? kStoreTapes : common.store(), data<T>(start), data<T>(ys),
         data<T>(stored), data<int64_t>(evaluations), data<double>(residual), failures.data()},
        executor());
    interruptible.check();
    check_failures(first_failures(failures.data(), samples, false), samples, common.tolerance, common.drift_tolerance);
    return {ys, stored, evaluations, residual};
  }

  template <class T>
  static GradientResult run_backward(const Common& common, const ProgramOwner& owner, const Tensor& y0,
                                     const BackwardArguments& arguments, int64_t kept_per_step) {
    const Grid grid = common.grid();
    const int64_t samples = y0.size(0);
    const bool taped = arguments.stored.dim() == 1;
    const int64_t elements = taped ? tapes<T>(owner, common, samples, kept_per_step) : 0;
    NODESHAPE_CHECK(!taped || elements > 0, common.op, "stages has one dimension, but this solve stores no tapes");
    const Sizes kept = taped ? Sizes{elements} : owner.stored(common, y0);
    owner.check_backward(common, y0, arguments, kept);
    const Tensor grad_ys = dense(arguments.grad_ys), ys = dense(arguments.ys), stored = dense(arguments.stored);

    const auto grad_parameters = std::make_unique_for_overwrite<T[]>(owner.model().program.parameters());
    const Tensor grad_y0 = empty(sizes_of(y0), dtype_of<T>());
    const Tensor grad_t = empty({grid.count}, aoti_torch_dtype_float64());
    const Tensor evaluations = empty({samples}, aoti_torch_dtype_int64());
    std::vector<Failure> failures(samples);
    const Interruptible interruptible(work_of(y0, grid));
    dispatch_backward<T>(owner,
                         {grid, common.stage(), samples, adjoint_of(common), taped ? kStoreTapes : common.store(),
                          common.drift_tolerance, data<T>(grad_ys), data<T>(ys), data<T>(stored), data<T>(grad_y0),
                          data<double>(grad_t), grad_parameters.get(), data<int64_t>(evaluations), failures.data()},
                         executor());
    interruptible.check();
    check_failures(first_failures(failures.data(), samples, true), samples, common.tolerance, common.drift_tolerance);

    return {grad_y0, grad_t, parted<T>(grad_parameters.get(), owner.tensors()), evaluations};
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
      "solve(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, int[] steps,"
      " float tolerance, int max_iterations, int adjoint, int kept_per_step, int checkpoint_every,"
      " float drift_tolerance) -> (Tensor ys, Tensor stages, Tensor evaluations, Tensor residual)");
  m.def(
      "solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights, Tensor program,"
      " Tensor constants, Tensor tableau, int[] steps, float tolerance, int max_iterations, int adjoint,"
      " int kept_per_step, int checkpoint_every, float drift_tolerance)"
      " -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor evaluations)");
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CPU, m) {
  m.impl("solve", TORCH_BOX(&solve<Cpu>));
  m.impl("solve_backward", TORCH_BOX(&solve_backward<Cpu>));
}

}  // namespace nodeshape
