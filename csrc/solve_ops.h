// Arguments and results of the ops, of either device, and their checks.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>

#ifndef NODESHAPE_ONNXRUNTIME
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#endif

#include "arguments.h"
#include "program_plan.h"

namespace nodeshape {

inline constexpr size_t kPlansKept = 16;  // by each thread: a model has a few programs, which take turns

/// What both ops are given besides states and times.
struct ProgramArguments {
  std::vector<Tensor> weights;
  Tensor code, constants, tableau;
};

/// States that a step keeps where the kernels choose, and where they keep tapes wherever they can.
inline constexpr int64_t kKernelsChoose = 0, kTapes = -1;

template <class T>
const T* numbers(const std::string& op, const char* name, const Tensor& x, ScalarType type) {
  NODESHAPE_CHECK(x.is_cpu() && x.scalar_type() == type && x.is_contiguous(), op,
                  std::string(name) + " must be a dense CPU tensor of its type");
  return data<T>(x);
}

/// The plan of a program, made when this thread first solves it; of the programs that it solved last.
inline const Program& planned(const int64_t* code, int64_t length, const double* constants, int64_t count,
                              const std::vector<int64_t>& sizes) {
  struct Known {
    std::vector<int64_t> code, sizes;
    std::vector<double> constants;
    std::unique_ptr<ProgramPlan> plan;
  };
  static thread_local std::vector<Known> latest;  // the latest first
  const auto same = [](const auto& known, const auto* given, int64_t size) {
    return int64_t(known.size()) == size && std::memcmp(known.data(), given, size * sizeof(*given)) == 0;
  };
  auto found = std::find_if(latest.begin(), latest.end(), [&](const Known& known) {
    return same(known.code, code, length) && same(known.constants, constants, count) && known.sizes == sizes;
  });
  if (found == latest.end()) {
    auto plan = std::make_unique<ProgramPlan>(code, length, constants, count, sizes);
    if (latest.size() == kPlansKept) latest.pop_back();
    latest.push_back({{code, code + length}, sizes, {constants, constants + count}, std::move(plan)});
    found = latest.end() - 1;
  }
  std::rotate(latest.begin(), found, found + 1);
  return latest.front().plan->program();
}

/// A program for the samples of y0, and its weights, checked.
class WeightedProgram {
 public:
  WeightedProgram(const std::string& op, const Tensor& y0, const ProgramArguments& given)
      : program_(make(op, y0, given)) {
    int64_t elements = 1;
    for (int64_t d = 1; d < y0.dim(); ++d) elements *= y0.size(d);
    NODESHAPE_CHECK(y0.dim() >= 1 && elements == program_.state(), op,
                    "a sample of y0 has " + std::to_string(elements) + " elements but the program expects " +
                        std::to_string(program_.state()));
  }

  const Program& program() const { return program_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }
  const void* const* pointers() const { return pointers_.data(); }

 private:
  const Program& make(const std::string& op, const Tensor& y0, const ProgramArguments& given) {
    std::vector<int64_t> sizes;
    sizes.reserve(given.weights.size());
    tensors_.reserve(given.weights.size());
    pointers_.reserve(given.weights.size());
    for (const Tensor& weight : given.weights) {
      check_kind(op, {"weights.", int64_t(sizes.size())}, weight, y0);
      sizes.push_back(weight.numel());
      tensors_.push_back(dense(weight));
      pointers_.push_back(tensors_.back().data_ptr());
    }
    return planned(numbers<int64_t>(op, "program", given.code, ScalarType::Long), given.code.numel(),
                   numbers<double>(op, "constants", given.constants, ScalarType::Double), given.constants.numel(),
                   sizes);
  }

  std::vector<Tensor> tensors_;
  std::vector<const void*> pointers_;
  const Program& program_;
};

/// A program, its weights and its tableau, checked, and the kernel that solves it.
class ProgramOwner {
 public:
  /// `kept_per_step` is the number of states that `discrete` keeps per step, or who chooses it.
  ProgramOwner(const Common& common, const Tensor& y0, const ProgramArguments& given, int64_t kept_per_step)
      : weighted_(common.op, y0, given),
        model_{weighted_.program(), weighted_.pointers(), tableau_of(common.op, given.tableau)},
        conv_(model_.program.conv) {
    if (common.adjoint == kReversible || common.store() > 0 || common.adjoint == kContinuous)
      NODESHAPE_CHECK(
          model_.tableau.stages == 1, common.op,
          "only steps of one stage can be undone, the tableau has " + std::to_string(model_.tableau.stages));
    const bool suits =
        model_.tableau.stages == 1 && model_.tableau.b[0] == 1 && model_.tableau.c[0] == model_.tableau.a[0];
    if (!suits || (kept_per_step != kKernelsChoose && kept_per_step != kConvMapsKept)) conv_.channels = 0;
    if (conv_.channels > 0) std::copy_n(weighted_.pointers(), 10, conv_.parameters);
  }

  const ProgramModel& model() const { return model_; }
  /// What the kernel of ConvDynamics is given if that is to solve it, or null.
  const ConvModel* conv() const { return conv_.channels > 0 ? &conv_ : nullptr; }
  const std::vector<Tensor>& tensors() const { return weighted_.tensors(); }

  /// [rows, ...]: of the states that `common` has the forward solve keep; how their numbers lie is the kernel's affair.
  Sizes stored(const Common& common, const Tensor& y0) const {
    const int64_t per_step = common.store() != kStoreStages ? 1 : conv() ? kConvMapsKept : model_.tableau.kept();
    Sizes sizes = sizes_of(y0);
    sizes.insert(sizes.begin(), per_step * stored_rows(common.store(), common.grid()));
    checked_bytes(common.op + ": stages", sizes, element_size(y0));
    return sizes;
  }

  void check_backward(const Common& common, const Tensor& y0, const BackwardArguments& arguments,
                      const Sizes& kept) const {
    Sizes sizes = sizes_of(y0);
    sizes.insert(sizes.begin(), int64_t(common.times.size()));
    check_tensor(common.op, {"ys"}, arguments.ys, y0, sizes);
    check_tensor(common.op, {"grad_ys"}, arguments.grad_ys, y0, sizes);
    check_tensor(common.op, {"stages"}, arguments.stored, y0, kept);
  }

 private:
  /// [stages + 2, stages]: a, b, c.
  static Tableau tableau_of(const std::string& op, const Tensor& x) {
    const double* numbers_of = numbers<double>(op, "tableau", x, ScalarType::Double);
    const int64_t stages = x.dim() == 2 ? x.size(1) : 0;
    NODESHAPE_CHECK(stages >= 1 && stages <= kMostStages && x.size(0) == stages + 2, op,
                    "tableau must be [stages + 2, stages] for at most " + std::to_string(kMostStages) +
                        " stages, got " + text(sizes_of(x)));
    Tableau tableau{stages, numbers_of, numbers_of + stages * stages, numbers_of + stages * (stages + 1), {}};
    for (int64_t i = 0; i < stages; ++i)
      for (int64_t j = i + 1; j < stages; ++j)
        NODESHAPE_CHECK(tableau.at(i, j) == 0, op, "tableau must be lower triangular");
    for (int64_t i = stages - 1; i >= 0; --i) {
      tableau.used[i] = tableau.b[i] != 0;
      for (int64_t j = i + 1; j < stages; ++j)
        if (tableau.at(j, i) != 0 && tableau.used[j]) tableau.used[i] = true;
    }
    return tableau;
  }

  const WeightedProgram weighted_;
  const ProgramModel model_;
  ConvModel conv_;
};

inline Common common_of(const char* op, const Tensor& t, std::vector<int64_t> steps, const Tensor& tableau,
                        double tolerance, int64_t max_iterations, int64_t adjoint, int64_t checkpoint_every,
                        double drift_tolerance) {
  // Of one stage, where it lies; the loop of several stages does not ask.
  const bool one = tableau.is_cpu() && tableau.scalar_type() == ScalarType::Double && tableau.numel() == 3;
  const double theta = one ? data<double>(dense(tableau))[2] : 0.0;
  return {op,      times_of(t),      std::move(steps), theta, tolerance, max_iterations,
          adjoint, checkpoint_every, drift_tolerance};
}

#ifndef NODESHAPE_ONNXRUNTIME
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

// ---- the ops of a device, whose Backend has
//     kLargestSample                                                  elements of a sample that its kernels can count
//     check(common, name, y0)                                         whether the state, so called, can be read
//     run<T>(common, owner, y0, kept_per_step)                        -> SolveResult
//     run_backward<T>(common, owner, y0, arguments, kept_per_step)    -> GradientResult

template <class Backend>
SolveResult solve(Tensor y0, Tensor t, std::vector<Tensor> weights, Tensor program, Tensor constants, Tensor tableau,
                  std::vector<int64_t> steps, double tolerance, int64_t max_iterations, int64_t adjoint,
                  int64_t kept_per_step, int64_t checkpoint_every, double drift_tolerance) {
  const Common common = common_of("solve", t, std::move(steps), tableau, tolerance, max_iterations, adjoint,
                                  checkpoint_every, drift_tolerance);
  Backend::check(common, "y0", y0);
  common.check_arguments(y0, Backend::kLargestSample);
  const ProgramOwner owner(common, y0, {std::move(weights), program, constants, tableau}, kept_per_step);
  return y0.scalar_type() == ScalarType::Float ? Backend::template run<float>(common, owner, y0, kept_per_step)
                                               : Backend::template run<double>(common, owner, y0, kept_per_step);
}

template <class Backend>
GradientResult solve_backward(Tensor grad_ys, Tensor ys, Tensor stages, Tensor t, std::vector<Tensor> weights,
                              Tensor program, Tensor constants, Tensor tableau, std::vector<int64_t> steps,
                              double tolerance, int64_t max_iterations, int64_t adjoint, int64_t kept_per_step,
                              int64_t checkpoint_every, double drift_tolerance) {
  const Common common = common_of("solve_backward", t, std::move(steps), tableau, tolerance, max_iterations, adjoint,
                                  checkpoint_every, drift_tolerance);
  const Tensor y0 = first(common.op, ys);
  Backend::check(common, "ys", y0);
  common.check_arguments(y0, Backend::kLargestSample);
  const ProgramOwner owner(common, y0, {std::move(weights), program, constants, tableau}, kept_per_step);
  const BackwardArguments arguments{grad_ys, ys, stages};
  return y0.scalar_type() == ScalarType::Float
             ? Backend::template run_backward<float>(common, owner, y0, arguments, kept_per_step)
             : Backend::template run_backward<double>(common, owner, y0, arguments, kept_per_step);
}
#endif

}  // namespace nodeshape
