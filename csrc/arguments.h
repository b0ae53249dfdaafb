// The arguments of the ops, of any device and runtime: checks of each of them before any work, and the errors of
// samples that failed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "problem.h"
#include "tensor.h"

namespace nodeshape {

// ---- checks ----------------------------------------------------------------------------------------------------

[[noreturn]] inline void fail(const std::string& op, const std::string& message) {
  throw std::runtime_error(op + ": " + message);
}

/// A macro so that a message is only put together when it is needed.
#define NODESHAPE_CHECK(good, op, message) \
  if (!(good)) fail(op, message)

/// What a tensor is called in messages; of several that are numbered, which.
struct Name {
  const char* before;
  int64_t number = -1;
  const char* after = "";

  std::string text() const { return number < 0 ? before : before + std::to_string(number) + after; }
};

/// A tensor the kernels can read: on the state's device and of its dtype.
inline void check_kind(const std::string& op, const Name& name, const Tensor& x, const Tensor& y0) {
  NODESHAPE_CHECK(x.is_cpu() ? y0.is_cpu() : !y0.is_cpu() && x.get_device_index() == y0.get_device_index(), op,
                  name.text() + " must be on the device of y0");
  NODESHAPE_CHECK(x.scalar_type() == y0.scalar_type(), op, name.text() + " must have the dtype of y0");
}

/// Besides, of a given shape.
template <class Shape>
void check_tensor(const std::string& op, const Name& name, const Tensor& x, const Tensor& y0, const Shape& expected) {
  check_kind(op, name, x, y0);
  const auto sizes = x.sizes();
  NODESHAPE_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op,
                  name.text() + " is " + text(sizes_of(x)) + " but must be " + text(Sizes(expected)));
}

inline int64_t element_size(const Tensor& x) { return x.scalar_type() == ScalarType::Float ? 4 : 8; }

/// Observation times as numbers; none if the tensor cannot hold any.
inline std::vector<double> times_of(const Tensor& t) {
  const bool single = t.scalar_type() == ScalarType::Float;
  if (!t.is_cpu() || t.dim() != 1 || !(single || t.scalar_type() == ScalarType::Double)) return {};
  const Tensor row = dense(t);
  const int64_t count = row.size(0);
  if (single) return {data<float>(row), data<float>(row) + count};
  return {data<double>(row), data<double>(row) + count};
}

inline std::string format(const char* pattern, double value) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, pattern, value);
  return buffer;
}

/// Steps in an interval beyond which their number is taken for a mistake, as in the package.
inline constexpr int64_t kMostSteps = 10'000'000;

/// What the gradient of a solve will need, as the ops are told: the numbers of nodeshape/_ode/fused.py's ADJOINTS.
enum Recorded : int64_t { kNone, kDiscrete, kReversible, kContinuous };

/// What every op is given besides the model.
struct Common {
  std::string op;
  std::vector<double> times;
  std::vector<int64_t> steps;
  double theta, tolerance;
  int64_t max_iterations;
  int64_t adjoint;  // one of Recorded
  int64_t checkpoint_every;
  double drift_tolerance;

  /// What the forward solve keeps for this gradient mode.
  int64_t store() const {
    if (adjoint == kDiscrete) return kStoreStages;
    return adjoint == kReversible ? checkpoint_every : kStoreNothing;
  }
  Grid grid() const { return {times.data(), int64_t(times.size()), steps.data(), theta}; }
  StageOptions stage() const { return {tolerance, max_iterations}; }

  void check_arguments(const Tensor& y0, int64_t largest_sample) const {
    NODESHAPE_CHECK(y0.scalar_type() == ScalarType::Float || y0.scalar_type() == ScalarType::Double, op,
                    "y0 must be float32 or float64");
    NODESHAPE_CHECK(!times.empty(), op,
                    "t must be a one-dimensional float32 or float64 tensor of at least one time on the CPU");
    NODESHAPE_CHECK(steps.size() + 1 == times.size(), op,
                    "got " + std::to_string(steps.size()) + " step counts for " + std::to_string(times.size()) +
                        " observation times; give one for each interval between them");
    check_grid();
    NODESHAPE_CHECK(
        theta == 0.0 || theta == 0.5 || theta == 1.0, op,
        "theta must be 0 (euler), 0.5 (implicit_midpoint) or 1 (implicit_euler), got " + std::to_string(theta));
    NODESHAPE_CHECK(tolerance > 0 && std::isfinite(tolerance), op,
                    "tolerance must be positive and finite, got " + format("%g", tolerance));
    NODESHAPE_CHECK(max_iterations >= 1, op,
                    "max_iterations must be at least 1, got " + std::to_string(max_iterations));
    NODESHAPE_CHECK(adjoint >= kNone && adjoint <= kContinuous, op,
                    "unknown adjoint " + std::to_string(adjoint) +
                        ": choose one of 0 (none), 1 (discrete), 2 (reversible), 3 (continuous)");
    NODESHAPE_CHECK(
        checkpoint_every >= 0, op,
        "checkpoint_every must be a number of steps, or 0 for none, got " + std::to_string(checkpoint_every));
    NODESHAPE_CHECK(drift_tolerance > 0, op,
                    "drift_tolerance must be positive, got " + std::to_string(drift_tolerance));
    check_sizes(y0, largest_sample);
  }

 private:
  /// Finite times in order, and steps between them that are neither too many nor too small to tell from none.
  void check_grid() const {
    for (double time : times) NODESHAPE_CHECK(std::isfinite(time), op, "t must be finite, got " + format("%g", time));
    int64_t total = 0;
    for (size_t j = 0; j < steps.size(); ++j) {
      const double length = times[j + 1] - times[j];
      NODESHAPE_CHECK(length != 0 && (length > 0) == (times[1] > times[0]), op,
                      "t must increase or decrease strictly, got " + format("%g", times[j]) + " and " +
                          format("%g", times[j + 1]) + " next to each other; sort the times and leave out repetitions");
      NODESHAPE_CHECK(std::isfinite(length), op,
                      "an interval of t must have a finite length, got " + format("%g", times[j]) + " to " +
                          format("%g", times[j + 1]) + "; take times that are closer together");
      NODESHAPE_CHECK(steps[j] >= 1, op, "every interval needs at least 1 step, got " + std::to_string(steps[j]));
      NODESHAPE_CHECK(steps[j] <= kMostSteps, op,
                      "an interval may have at most " + std::to_string(kMostSteps) + " steps, got " +
                          std::to_string(steps[j]) + "; take fewer");
      NODESHAPE_CHECK(length / double(steps[j]) != 0, op,
                      std::to_string(steps[j]) + " steps from " + format("%g", times[j]) + " to " +
                          format("%g", times[j + 1]) + " have length 0; take fewer, or times that are further apart");
      NODESHAPE_CHECK(!__builtin_add_overflow(total, steps[j], &total), op, "too many steps in all; take fewer");
    }
  }

  /// Whether what is computed from the state's sizes, here and by kernels, overflows nowhere.
  void check_sizes(const Tensor& y0, int64_t largest_sample) const {
    Sizes sizes = sizes_of(y0);
    if (sizes.empty()) return;  // which no model takes
    Sizes sample(sizes.begin() + 1, sizes.end());
    for (int64_t& size : sample) size += 8;  // padding of channels and the frame of a map
    int64_t elements;
    NODESHAPE_CHECK(multiply(sample, 1, &elements) && elements <= largest_sample, op,
                    "a sample of y0, " + text(sizes) + ", is too large; with 8 more in each dimension it may have " +
                        std::to_string(largest_sample) + " elements: make it smaller");
    sizes.insert(sizes.begin(), int64_t(times.size()));
    checked_bytes(op + ": ys", sizes, element_size(y0));
  }
};

// ---- results ---------------------------------------------------------------------------------------------------

/// Raise for the samples that failed first, if any did.
inline void check_failures(const FirstFailures& failed, int64_t samples, double tolerance, double drift_tolerance) {
  if (failed.count == 0) return;
  const Failure& worst = failed.worst;
  const std::string some = std::to_string(failed.count) + " of " + std::to_string(samples) + " samples";
  if (worst.kind == Failure::drift)
    throw std::runtime_error(
        "ReversalDriftError: " + some + " drifted by up to " + format("%.1e", failed.residual) +
        " (relative) when the trajectory was rebuilt back to t=" + format("%.6g", worst.t) + ", tolerance " +
        format("%.1e", drift_tolerance) +
        ": the flow contracts too strongly to be undone; set options={'checkpoint_every': m} with a smaller m, or use"
        " adjoint='discrete'");
  static const char* const sweeps[] = {"forward", "reversed", "transposed", "backward"};
  throw std::runtime_error(
      "StageSolveError: " + some + " (the first is number " + std::to_string(failed.first) + ") did not solve the " +
      sweeps[int(worst.sweep)] + " stage equation at t=" + format("%.6g", worst.t) +
      " with h=" + format("%.3g", worst.h) + ": relative residual " + format("%.1e", worst.residual) + " after " +
      std::to_string(worst.evaluations) + " evaluations, tolerance " + format("%.1e", tolerance) + "; " +
      (worst.sweep == Sweep::reversed ? "use adjoint='discrete'" : "take smaller steps") +
      ", for a small stiff state use options={'stage_solver': 'newton'}, or loosen options={'stage_tolerance': ...}");
}

struct BackwardArguments {
  Tensor grad_ys, ys, stored;
};

}  // namespace nodeshape
