// The ops of programs on the CPU.
#include "isa.h"
#include "tensors.h"
#include "../program_ops.h"

namespace nodeshape {
namespace {

constexpr int64_t kLargestSample = int64_t(1) << 36;  // elements
template <class T>
SolveResult run(const Common& common, const ProgramOwner& owner, const ProgramKernelsOf<T>& kernels, const Tensor& y0) {
  const Grid grid = common.grid();
  const int64_t samples = y0.size(0);
  Sizes sizes = sizes_of(y0);
  sizes.insert(sizes.begin(), grid.count);
  const Tensor ys = empty(sizes, dtype_of<T>());
  const Tensor stored = empty_stored(owner.stored(common, y0), dtype_of<T>());
  const Tensor evaluations = empty({samples}, aoti_torch_dtype_int64());
  const Tensor residual = empty({samples}, aoti_torch_dtype_float64());
  const Tensor start = dense(y0);
  std::vector<Failure> failures(samples);
  kernels.forward(owner.model(),
                  {grid, common.stage(), samples, common.store(), data<T>(start), data<T>(ys), data<T>(stored),
                   data<int64_t>(evaluations), data<double>(residual), failures.data()},
                  executor());
  check_failures(first_failures(failures.data(), samples, false), samples, common.tolerance, common.drift_tolerance);
  return {ys, stored, evaluations, residual};
}

template <class T>
GradientResult run_backward(const Common& common, const ProgramOwner& owner, const ProgramKernelsOf<T>& kernels,
                            const Tensor& y0, const BackwardArguments& arguments) {
  const Grid grid = common.grid();
  const int64_t samples = y0.size(0);
  owner.check_backward(common, y0, arguments);
  const Tensor grad_ys = dense(arguments.grad_ys), ys = dense(arguments.ys), stored = dense(arguments.stored);

  std::vector<T> grad_parameters(owner.model().program.parameters());
  const Tensor grad_y0 = empty(sizes_of(y0), dtype_of<T>());
  const Tensor grad_t = empty({grid.count}, aoti_torch_dtype_float64());
  const Tensor evaluations = empty({samples}, aoti_torch_dtype_int64());
  std::vector<Failure> failures(samples);
  kernels.backward(owner.model(),
                   {grid, common.stage(), samples, adjoint_of(common), common.store(), common.drift_tolerance,
                    data<T>(grad_ys), data<T>(ys), data<T>(stored), data<T>(grad_y0), data<double>(grad_t),
                    grad_parameters.data(), data<int64_t>(evaluations), failures.data()},
                   executor());
  check_failures(first_failures(failures.data(), samples, true), samples, common.tolerance, common.drift_tolerance);

  std::vector<Tensor> grads;
  const T* from = grad_parameters.data();
  for (const Tensor& x : owner.tensors()) {
    grads.push_back(empty(sizes_of(x), dtype_of<T>()));
    std::copy(from, from + x.numel(), data<T>(grads.back()));
    from += x.numel();
  }
  return {grad_y0, grad_t, grads, evaluations};
}

SolveResult solve(Tensor y0, Tensor t, std::vector<Tensor> weights, Tensor program, Tensor constants, Tensor tableau,
                  std::vector<int64_t> steps, double tolerance, int64_t max_iterations, int64_t adjoint,
                  int64_t /*kept_per_step, which the shape of `stages` follows from*/, int64_t checkpoint_every,
                  double drift_tolerance) {
  const Common common = common_of("solve", t, std::move(steps), tableau, tolerance, max_iterations, adjoint,
                                  checkpoint_every, drift_tolerance);
  NODESHAPE_CHECK(y0.is_cpu(), common.op, "y0 must be on the CPU");
  common.check_arguments(y0, kLargestSample);
  const ProgramOwner owner(common, y0, {std::move(weights), program, constants, tableau});
  return y0.scalar_type() == ScalarType::Float ? run<float>(common, owner, program_kernels().float32, y0)
                                               : run<double>(common, owner, program_kernels().float64, y0);
}

GradientResult solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, std::vector<Tensor> weights,
                              Tensor program, Tensor constants, Tensor tableau, std::vector<int64_t> steps,
                              double tolerance, int64_t max_iterations, int64_t adjoint, int64_t /*kept_per_step*/,
                              int64_t checkpoint_every, double drift_tolerance) {
  const Common common = common_of("solve_backward", t, std::move(steps), tableau, tolerance, max_iterations, adjoint,
                                  checkpoint_every, drift_tolerance);
  const Tensor y0 = first(common.op, ys);
  NODESHAPE_CHECK(y0.is_cpu(), common.op, "ys must be on the CPU");
  common.check_arguments(y0, kLargestSample);
  const ProgramOwner owner(common, y0, {std::move(weights), program, constants, tableau});
  const BackwardArguments arguments{grad_ys, ys, stages};
  return y0.scalar_type() == ScalarType::Float
             ? run_backward<float>(common, owner, program_kernels().float32, y0, arguments)
             : run_backward<double>(common, owner, program_kernels().float64, y0, arguments);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nodeshape, m) {
  m.def(
      "solve(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, int[] steps, "
      "float "
      "tolerance, int max_iterations, int adjoint, int kept_per_step, int checkpoint_every, float drift_tolerance) -> "
      "(Tensor ys, Tensor stages, Tensor evaluations, Tensor residual)");
  m.def(
      "solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, Tensor[] weights, Tensor program, Tensor "
      "constants, Tensor tableau, int[] steps, float tolerance, int max_iterations, int adjoint, int kept_per_step, "
      "int "
      "checkpoint_every, float drift_tolerance) -> (Tensor grad_y0, Tensor grad_t, Tensor[] grad_weights, Tensor "
      "evaluations)");
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CPU, m) {
  m.impl("solve", TORCH_BOX(&solve));
  m.impl("solve_backward", TORCH_BOX(&solve_backward));
}

}  // namespace nodeshape
