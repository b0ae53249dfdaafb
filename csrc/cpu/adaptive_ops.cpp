// The ops of programs under error control, on the CPU.
#include <cmath>
#include <memory>

#include "isa.h"
#include "tensors.h"

namespace nodeshape {
namespace {

constexpr double kUnknownWork = 1e300;

/// A program, its weights and its method under error control, checked.
class AdaptiveOwner {
 public:
  AdaptiveOwner(const std::string& op, const Tensor& y0, const Tensor& t, const ProgramArguments& given)
      : times_(checked_times(op, y0, t)),
        weighted_(op, y0, given),
        model_{weighted_.program(), weighted_.pointers(), method_of(op, given.tableau)} {
    int64_t ignored;
    NODESHAPE_CHECK(multiply({int64_t(times_.size()), y0.numel()}, 8, &ignored), op, "the solution is too large");
  }

  const AdaptiveModel& model() const { return model_; }
  const std::vector<double>& times() const { return times_; }
  const std::vector<Tensor>& tensors() const { return weighted_.tensors(); }

 private:
  static std::vector<double> checked_times(const std::string& op, const Tensor& y0, const Tensor& t) {
    NODESHAPE_CHECK(y0.is_cpu() && (y0.scalar_type() == ScalarType::Float || y0.scalar_type() == ScalarType::Double),
                    op, "y0 must be float32 or float64 on the CPU");
    std::vector<double> times = times_of(t);
    NODESHAPE_CHECK(times.size() >= 2, op, "t must be a float32 or float64 tensor of at least two times on the CPU");
    for (size_t j = 0; j < times.size(); ++j)
      NODESHAPE_CHECK(
          std::isfinite(times[j]) && (j == 0 || (std::isfinite(times[j] - times[j - 1]) && times[j] != times[j - 1] &&
                                                 (times[j] > times[j - 1]) == (times[1] > times[0]))),
          op, "t must be finite and strictly increasing or decreasing");
    return times;
  }

  /// [stages + 7, stages]: a, b, c, error, dense.
  static Embedded method_of(const std::string& op, const Tensor& x) {
    const int64_t stages = x.dim() == 2 ? x.size(1) : 0;
    NODESHAPE_CHECK(stages >= 2 && stages <= kMostStages && x.size(0) == stages + 7, op,
                    "tableau must be [stages + 7, stages] for 2 to " + std::to_string(kMostStages) + " stages, got " +
                        text(sizes_of(x)));
    const double* rows = numbers<double>(op, "tableau", x, ScalarType::Double);
    const double* behind = rows + stages * (stages + 2);
    const Tableau tableau{stages, rows, rows + stages * stages, rows + stages * (stages + 1), {}};
    bool good = tableau.is_explicit();
    for (int64_t i = 0; i < stages; ++i) {
      for (int64_t j = i + 1; j < stages; ++j) good = good && tableau.at(i, j) == 0;
      good = good && tableau.at(stages - 1, i) == tableau.b[i];
    }
    NODESHAPE_CHECK(
        good && tableau.c[0] == 0 && tableau.c[stages - 1] == 1, op,
        "tableau must be explicit, begin with the slope at the start and end with that at the end of a step");
    return {tableau, behind, behind + stages};
  }

  const std::vector<double> times_;
  const WeightedProgram weighted_;
  const AdaptiveModel model_;
};

/// The steps that chunks of samples record, and them all behind each other.
template <class T>
class Records {
 public:
  Records(int64_t samples, int64_t sample)
      : per_chunk_(samples_per_chunk(samples)), sample_(sample), chunks_((samples + per_chunk_ - 1) / per_chunk_) {}

  static void more(void* context, int64_t chunk, Slab<T>* slab) {
    Records& records = *static_cast<Records*>(context);
    std::vector<Memory>& slabs = records.chunks_[chunk];
    constexpr int64_t kSteps = Slab<T>::kSteps;
    slabs.push_back({std::unique_ptr<T[]>(new T[kSteps * records.sample_]),
                     std::unique_ptr<double[]>(new double[2 * kSteps]),
                     std::unique_ptr<int64_t[]>(new int64_t[kSteps])});
    const Memory& memory = slabs.back();
    *slab = {memory.states.get(), memory.spans.get(), memory.before.get()};
  }

  /// Tensors of all steps; `last` and `before` then count from the first of all.
  std::tuple<Tensor, Tensor, Tensor> joined(const int64_t* accepted, int64_t samples, int64_t* last) const {
    std::vector<int64_t> counts(chunks_.size());
    int64_t total = 0;
    for (int64_t n = 0; n < samples; ++n) counts[n / per_chunk_] += accepted[n];
    for (int64_t count : counts) total += count;
    const Tensor states = empty({total, sample_}, dtype_of<T>()), spans = empty({total, 2}, aoti_torch_dtype_float64()),
                 before = empty({total}, aoti_torch_dtype_int64());
    int64_t first = 0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      for (int64_t n = int64_t(c) * per_chunk_; n < std::min(samples, int64_t(c + 1) * per_chunk_); ++n)
        if (last[n] >= 0) last[n] += first;
      for (int64_t done = 0; done < counts[c]; done += Slab<T>::kSteps) {
        const Memory& memory = chunks_[c][done / Slab<T>::kSteps];
        const int64_t some = std::min(Slab<T>::kSteps, counts[c] - done), at = first + done;
        std::copy_n(memory.states.get(), some * sample_, data<T>(states) + at * sample_);
        std::copy_n(memory.spans.get(), some * 2, data<double>(spans) + at * 2);
        for (int64_t k = 0; k < some; ++k)
          data<int64_t>(before)[at + k] = memory.before[k] < 0 ? -1 : memory.before[k] + first;
      }
      first += counts[c];
    }
    return {states, spans, before};
  }

 private:
  struct Memory {
    std::unique_ptr<T[]> states;
    std::unique_ptr<double[]> spans;
    std::unique_ptr<int64_t[]> before;
  };
  const int64_t per_chunk_, sample_;
  std::vector<std::vector<Memory>> chunks_;
};

using AdaptiveResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
AdaptiveResult run_adaptive(const AdaptiveOwner& owner, const Tensor& y0, const Control& control, bool record) {
  const int64_t samples = y0.size(0), count = int64_t(owner.times().size()), sample = owner.model().program.state();
  Sizes sizes = sizes_of(y0);
  sizes.insert(sizes.begin(), count);
  const Tensor ys = empty(sizes, dtype_of<T>()), counts = empty({3, samples}, aoti_torch_dtype_int64()),
               outcomes = empty({samples}, aoti_torch_dtype_int64()),
               failures = empty({samples, 2}, aoti_torch_dtype_float64()),
               last = empty({samples}, aoti_torch_dtype_int64());
  const Tensor start = dense(y0);
  int64_t* counted = data<int64_t>(counts);
  Records<T> records(samples, sample);
  const Interruptible interruptible(kUnknownWork);
  kernels().of<T>().adaptive.forward(
      owner.model(),
      {owner.times().data(), count, samples, control, data<T>(start), data<T>(ys), counted, counted + samples,
       counted + 2 * samples, data<int64_t>(outcomes), data<double>(failures), data<int64_t>(last),
       record ? &Records<T>::more : nullptr, &records},
      executor());
  interruptible.check();
  if (!record) {
    const Tensor none = empty({0}, aoti_torch_dtype_int64());
    return {ys,
            empty({0, sample}, dtype_of<T>()),
            empty({0, 2}, aoti_torch_dtype_float64()),
            none,
            last,
            counts,
            outcomes,
            failures};
  }
  const auto [states, spans, before] = records.joined(counted, samples, data<int64_t>(last));
  return {ys, states, spans, before, last, counts, outcomes, failures};
}

AdaptiveResult solve_adaptive(Tensor y0, Tensor t, std::vector<Tensor> weights, Tensor program, Tensor constants,
                              Tensor tableau, double rtol, double atol, double first_step, double min_step,
                              double max_step, double safety, double grow, double shrink, int64_t order,
                              int64_t most_attempts, bool record) {
  const std::string op = "solve_adaptive";
  const AdaptiveOwner owner(op, y0, t, {std::move(weights), program, constants, tableau});
  const Control control{rtol, atol, first_step, min_step, max_step, safety, grow, shrink, order, most_attempts};
  NODESHAPE_CHECK(rtol >= 0 && atol >= 0 && (rtol > 0 || atol > 0) && std::isfinite(rtol) && std::isfinite(atol), op,
                  "rtol and atol must be finite, not negative and not both 0");
  NODESHAPE_CHECK(first_step >= 0 && min_step >= 0 && max_step >= 0 && safety > 0 && grow > 0 && shrink > 0, op,
                  "what bounds the steps may not be negative");
  NODESHAPE_CHECK(order >= 1 && most_attempts >= 1, op, "order and most_attempts must be at least 1");
  return y0.scalar_type() == ScalarType::Float ? run_adaptive<float>(owner, y0, control, record)
                                               : run_adaptive<double>(owner, y0, control, record);
}

using AdaptiveGradients = std::tuple<Tensor, std::vector<Tensor>, Tensor>;

/// What a solve recorded.
struct Recorded {
  Tensor states, spans, before, last;
};

template <class T>
AdaptiveGradients run_adaptive_backward(const std::string& op, const AdaptiveOwner& owner, const Tensor& grad_ys,
                                        const Recorded& recorded) {
  const int64_t samples = grad_ys.size(1), count = int64_t(owner.times().size()),
                sample = owner.model().program.state();
  const int64_t steps = recorded.before.numel();
  NODESHAPE_CHECK(grad_ys.size(0) == count, op, "grad_ys must have as many times as t");
  NODESHAPE_CHECK(recorded.states.is_cpu() && recorded.states.scalar_type() == grad_ys.scalar_type() &&
                      recorded.states.is_contiguous() && recorded.states.dim() == 2 &&
                      recorded.states.size(0) == steps && recorded.states.size(1) == sample &&
                      recorded.spans.numel() == 2 * steps && recorded.last.numel() == samples,
                  op, "states, spans, before and last are not of one solve");
  const int64_t* before = numbers<int64_t>(op, "before", recorded.before, ScalarType::Long);
  const int64_t* last = numbers<int64_t>(op, "last", recorded.last, ScalarType::Long);
  const double* spans = numbers<double>(op, "spans", recorded.spans, ScalarType::Double);
  const double first = owner.times().front(), sign = owner.times().back() > first ? 1.0 : -1.0;
  for (int64_t k = 0; k < steps; ++k)
    NODESHAPE_CHECK(before[k] >= -1 && before[k] < k && sign * spans[2 * k] >= sign * first &&
                        sign * spans[2 * k + 1] > sign * spans[2 * k],
                    op, "before or spans do not go through steps in their order");
  for (int64_t n = 0; n < samples; ++n)
    NODESHAPE_CHECK(last[n] >= -1 && last[n] < steps, op, "last is beyond the steps");
  const Tensor cotangents = dense(grad_ys);
  Sizes sizes = sizes_of(grad_ys);
  sizes.erase(sizes.begin());
  const Tensor grad_y0 = empty(sizes, dtype_of<T>()), evaluations = empty({samples}, aoti_torch_dtype_int64());
  const auto grad_parameters = std::make_unique_for_overwrite<T[]>(owner.model().program.parameters());
  const Interruptible interruptible(double(steps) * double(sample));
  kernels().of<T>().adaptive.backward(
      owner.model(),
      {owner.times().data(), count, samples, data<T>(cotangents), data<T>(recorded.states), spans, before, last,
       data<T>(grad_y0), grad_parameters.get(), data<int64_t>(evaluations)},
      executor());
  interruptible.check();
  return {grad_y0, parted<T>(grad_parameters.get(), owner.tensors()), evaluations};
}

AdaptiveGradients solve_adaptive_backward(Tensor grad_ys, Tensor states, Tensor spans, Tensor before, Tensor last,
                                          Tensor t, std::vector<Tensor> weights, Tensor program, Tensor constants,
                                          Tensor tableau) {
  const std::string op = "solve_adaptive_backward";
  const AdaptiveOwner owner(op, first(op, grad_ys), t, {std::move(weights), program, constants, tableau});
  const Recorded recorded{states, spans, before, last};
  return grad_ys.scalar_type() == ScalarType::Float ? run_adaptive_backward<float>(op, owner, grad_ys, recorded)
                                                    : run_adaptive_backward<double>(op, owner, grad_ys, recorded);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nodeshape, m) {
  m.def(
      "solve_adaptive(Tensor y0, Tensor t, Tensor[] weights, Tensor program, Tensor constants, Tensor tableau, "
      "float rtol, float atol, float first_step, float min_step, float max_step, float safety, float grow, "
      "float shrink, int order, int most_attempts, bool record) -> (Tensor ys, Tensor states, Tensor spans, "
      "Tensor before, Tensor last, Tensor counts, Tensor outcomes, Tensor failures)");
  m.def(
      "solve_adaptive_backward(Tensor grad_ys, Tensor states, Tensor spans, Tensor before, Tensor last, Tensor t, "
      "Tensor[] weights, Tensor program, Tensor constants, Tensor tableau) -> (Tensor grad_y0, Tensor[] grad_weights, "
      "Tensor evaluations)");
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CPU, m) {
  m.impl("solve_adaptive", TORCH_BOX(&solve_adaptive));
  m.impl("solve_adaptive_backward", TORCH_BOX(&solve_adaptive_backward));
}

}  // namespace nodeshape
