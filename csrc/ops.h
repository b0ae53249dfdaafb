// The ops, for any device, and what a device brings to run them. A Backend has
//     kLargestSample                                      elements of a sample that its kernels can count
//     check(common, y0)                                   whether the state is where it can be read
//     solve(common, owner, y0)                            for a ConvOwner and an MlpOwner, -> SolveResult
//     solve_backward(common, owner, y0, arguments)        -> GradientResult
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"

namespace nodeshape {

using SolveResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GradientResult = std::tuple<Tensor, Tensor, std::vector<Tensor>, Tensor>;

/// y0, as the first observation.
inline Tensor first(const std::string& op, const Tensor& ys) {
  NODESHAPE_CHECK(ys.dim() >= 2 && ys.size(0) >= 1, op,
                  "ys must hold at least one observation, got " + text(sizes_of(ys)));
  // As select(ys, 0, 0), without the dispatcher, which costs as much as making a tensor.
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(ys.get(), ys.dim() - 1, ys.sizes().data() + 1,
                                                               ys.strides().data() + 1, ys.storage_offset(), &handle));
  return Tensor(handle);
}

inline Adjoint adjoint_of(const Common& common) {
  NODESHAPE_CHECK(common.adjoint != kNone, common.op, "the forward solve was asked for no gradient, adjoint 0");
  if (common.adjoint == kDiscrete) return Adjoint::discrete;
  return common.adjoint == kReversible ? Adjoint::reversible : Adjoint::continuous;
}

// ---- ops -------------------------------------------------------------------------------------------------------

template <class Backend>
SolveResult conv_solve(Tensor y0, Tensor t, std::vector<Tensor> weights, std::vector<int64_t> steps, double theta,
                       double tolerance, int64_t max_iterations, int64_t adjoint, int64_t checkpoint_every,
                       double drift_tolerance) {
  const Common common{"conv_solve",   times_of(t), std::move(steps), theta,          tolerance,
                      max_iterations, adjoint,     checkpoint_every, drift_tolerance};
  Backend::check(common, y0);
  common.check_arguments(y0, Backend::kLargestSample);
  ConvOwner owner;
  conv_model(common.op, y0, weights, owner);
  return Backend::solve(common, owner, y0);
}

template <class Backend>
GradientResult conv_solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, std::vector<Tensor> weights,
                                   std::vector<int64_t> steps, double theta, double tolerance, int64_t max_iterations,
                                   int64_t adjoint, int64_t checkpoint_every, double drift_tolerance) {
  const Common common{"conv_solve_backward", times_of(t), std::move(steps), theta,          tolerance,
                      max_iterations,        adjoint,     checkpoint_every, drift_tolerance};
  const Tensor y0 = first(common.op, ys);
  Backend::check(common, y0);
  common.check_arguments(y0, Backend::kLargestSample);
  ConvOwner owner;
  conv_model(common.op, y0, weights, owner);
  return Backend::solve_backward(common, owner, y0, {grad_ys, ys, stages});
}

template <class Backend>
SolveResult mlp_solve(Tensor y0, Tensor t, std::vector<Tensor> weights, int64_t activation, std::vector<int64_t> steps,
                      double theta, double tolerance, int64_t max_iterations, int64_t adjoint, int64_t checkpoint_every,
                      double drift_tolerance) {
  const Common common{"mlp_solve",    times_of(t), std::move(steps), theta,          tolerance,
                      max_iterations, adjoint,     checkpoint_every, drift_tolerance};
  Backend::check(common, y0);
  common.check_arguments(y0, Backend::kLargestSample);
  MlpOwner owner;
  mlp_model(common.op, y0, weights, activation, owner);
  return Backend::solve(common, owner, y0);
}

template <class Backend>
GradientResult mlp_solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, std::vector<Tensor> weights,
                                  int64_t activation, std::vector<int64_t> steps, double theta, double tolerance,
                                  int64_t max_iterations, int64_t adjoint, int64_t checkpoint_every,
                                  double drift_tolerance) {
  const Common common{"mlp_solve_backward", times_of(t), std::move(steps), theta,          tolerance,
                      max_iterations,       adjoint,     checkpoint_every, drift_tolerance};
  const Tensor y0 = first(common.op, ys);
  Backend::check(common, y0);
  common.check_arguments(y0, Backend::kLargestSample);
  MlpOwner owner;
  mlp_model(common.op, y0, weights, activation, owner);
  return Backend::solve_backward(common, owner, y0, {grad_ys, ys, stages});
}

/// The four ops of a device, for STABLE_TORCH_LIBRARY_IMPL.
#define NODESHAPE_REGISTER_OPS(m, Backend)                                 \
  m.impl("conv_solve", TORCH_BOX(&conv_solve<Backend>));                   \
  m.impl("conv_solve_backward", TORCH_BOX(&conv_solve_backward<Backend>)); \
  m.impl("mlp_solve", TORCH_BOX(&mlp_solve<Backend>));                     \
  m.impl("mlp_solve_backward", TORCH_BOX(&mlp_solve_backward<Backend>))

}  // namespace nodeshape
