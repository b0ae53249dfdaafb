// Arguments of the ops of programs, of either device, and their checks.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "arguments.h"
#include "program_plan.h"

namespace nodeshape {

inline constexpr size_t kPlansKept = 16;  // by each thread: a model has a few programs, which take turns

/// What both ops are given besides states and times.
struct ProgramArguments {
  std::vector<Tensor> weights;
  Tensor code, constants, tableau;
};

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

/// A program, its weights and its tableau, checked.
class ProgramOwner {
 public:
  ProgramOwner(const Common& common, const Tensor& y0, const ProgramArguments& given)
      : weighted_(common.op, y0, given),
        model_{weighted_.program(), weighted_.pointers(), tableau_of(common.op, given.tableau)} {
    if (common.adjoint == kReversible || common.store() > 0 || common.adjoint == kContinuous)
      NODESHAPE_CHECK(
          model_.tableau.stages == 1, common.op,
          "only steps of one stage can be undone, the tableau has " + std::to_string(model_.tableau.stages));
  }

  const ProgramModel& model() const { return model_; }
  const std::vector<Tensor>& tensors() const { return weighted_.tensors(); }

  /// [rows, ...]: of the states that `common` has the forward solve keep.
  Sizes stored(const Common& common, const Tensor& y0) const {
    const int64_t per_step = common.store() == kStoreStages ? model_.tableau.kept() : 1;
    Sizes sizes = sizes_of(y0);
    sizes.insert(sizes.begin(), per_step * stored_rows(common.store(), common.grid()));
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

}  // namespace nodeshape
