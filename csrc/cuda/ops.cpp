// The ops on CUDA.
//
// Nothing here waits for the device. A sample that fails gives NaN from there on, and leaves a report in host memory
// that the next op to run finds and raises (raise_failures() does nothing else).
#include "device.h"

namespace nodeshape {
namespace {

/// Kernels count the elements of a sample in int.
constexpr int64_t kLargestSample = std::numeric_limits<int>::max();

void check(const Common& common, const Tensor& y0) {
  NODESHAPE_CHECK(Device::has(y0), common.op, "y0 must be on a CUDA device");
  reports.raise();
  common.check_arguments(y0, kLargestSample);
}

void raise_failures() { reports.raise(); }

template <class T>
SolveResult run(const Common& common, const ProgramOwner& owner, const Tensor& y0) {
  const Sizes stored = owner.stored(common, y0);
  return owner.conv() != nullptr ? run<T>(common, *owner.conv(), stored, y0)
                                 : run<T>(common, owner.model(), stored, y0);
}

template <class T>
GradientResult run_backward(const Common& common, const ProgramOwner& owner, const Tensor& y0,
                            const BackwardArguments& arguments) {
  owner.check_backward(common, y0, arguments, owner.stored(common, y0));
  return owner.conv() != nullptr ? run_backward<T>(common, *owner.conv(), owner.tensors(), y0, arguments)
                                 : run_backward<T>(common, owner.model(), owner.tensors(), y0, arguments);
}

SolveResult solve(Tensor y0, Tensor t, std::vector<Tensor> weights, Tensor program, Tensor constants, Tensor tableau,
                  std::vector<int64_t> steps, double tolerance, int64_t max_iterations, int64_t adjoint,
                  int64_t kept_per_step, int64_t checkpoint_every, double drift_tolerance) {
  const Common common = common_of("solve", t, std::move(steps), tableau, tolerance, max_iterations, adjoint,
                                  checkpoint_every, drift_tolerance);
  check(common, y0);
  const ProgramOwner owner(common, y0, {std::move(weights), program, constants, tableau}, kept_per_step);
  return y0.scalar_type() == ScalarType::Float ? run<float>(common, owner, y0) : run<double>(common, owner, y0);
}

GradientResult solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, std::vector<Tensor> weights,
                              Tensor program, Tensor constants, Tensor tableau, std::vector<int64_t> steps,
                              double tolerance, int64_t max_iterations, int64_t adjoint, int64_t kept_per_step,
                              int64_t checkpoint_every, double drift_tolerance) {
  const Common common = common_of("solve_backward", t, std::move(steps), tableau, tolerance, max_iterations, adjoint,
                                  checkpoint_every, drift_tolerance);
  const Tensor y0 = first(common.op, ys);
  check(common, y0);
  const ProgramOwner owner(common, y0, {std::move(weights), program, constants, tableau}, kept_per_step);
  const BackwardArguments arguments{grad_ys, ys, stages};
  return y0.scalar_type() == ScalarType::Float ? run_backward<float>(common, owner, y0, arguments)
                                               : run_backward<double>(common, owner, y0, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nodeshape, m) { m.def("raise_failures() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CompositeExplicitAutograd, m) {
  m.impl("raise_failures", TORCH_BOX(&raise_failures));
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, NODESHAPE_DISPATCH_KEY, m) {
  m.impl("solve", TORCH_BOX(&solve));
  m.impl("solve_backward", TORCH_BOX(&solve_backward));
}

}  // namespace nodeshape
