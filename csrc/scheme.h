// The time loop: one-stage Runge-Kutta steps in theta, forwards and backwards, for a few samples side by side.
//
//     stage    Y       = y_k + theta h f(t_k + theta h, Y)
//     update   y_{k+1} = y_k + h f(t_k + theta h, Y)
//
// The loop knows theta and nothing of layers; dynamics.h says what it asks of a dynamics.
#pragma once

#include "dynamics.h"

namespace nodeshape::NODESHAPE_TARGET {

/// The samples from `first` on that fill `count` slots, as one thread carries them through time.
struct Group {
  int64_t first;
  int count;
};

/// Where the slots of a group begin and end among a problem's samples.
template <class D>
class Slots {
 public:
  NODESHAPE_FUNCTION Slots(Group group, int64_t samples) : first_(group.first), samples_(samples) {}

  NODESHAPE_FUNCTION int64_t first(int s) const { return first_ + s * int64_t(D::kSamples); }
  NODESHAPE_FUNCTION int members(int s) const {
    const int64_t left = samples_ - first(s);
    return left < D::kSamples ? int(left) : D::kSamples;
  }
  /// Calls body(n) for each sample n of slot s, on the thread that keeps the samples' records.
  template <class Body>
  NODESHAPE_FUNCTION void each(int s, Body&& body) const {
    if (!leads()) return;
    for (int64_t n = first(s), end = n + members(s); n < end; ++n) body(n);
  }

 private:
  int64_t first_, samples_;
};

namespace detail {

template <class T>
NODESHAPE_FUNCTION double dot(int64_t size, const T* x, const T* y) {
  return double(total<T>(size, [=](int64_t i) { return load(x + i) * load(y + i); }));
}

/// The sum of x_s . y_s over the stages of `x` and `y`, with one sum across a vector's lanes for all of them.
template <class T>
NODESHAPE_FUNCTION double value_dot_slope(int64_t size, int count, const StageSolver<T>& x, const StageSolver<T>& y) {
  return double(total<T>(size, [&](int64_t i) {
    Vec<T> sum{};
    for (int s = 0; s < count; ++s) sum = fma(load(x[s].value + i), load(y[s].slope + i), sum);
    return sum;
  }));
}

/// y += a x
template <class T>
NODESHAPE_FUNCTION void add(int64_t size, T a, const T* x, T* y) {
  const Vec<T> factor = splat(a);
  each<T>(size, [=](int64_t i) { store(y + i, fma(factor, load(x + i), load(y + i))); });
}

template <class T>
NODESHAPE_FUNCTION void fill(int64_t size, T a, T* y) {
  each<T>(size, [=](int64_t i) { store(y + i, splat(a)); });
}

template <class T>
NODESHAPE_FUNCTION bool is_finite(int64_t size, const T* x) {
  return total<T>(size, [=](int64_t i) { return load(x + i) - load(x + i); }) == T(0);
}

/// Take note of samples whose stage was not solved and let them go on as NaN, which costs one evaluation per stage. It
/// is no failure if the function was linearised about an `origin` that is not finite: such a sample's gradient is NaN.
template <Dynamics D, class T>
NODESHAPE_FUNCTION void judge(const StageSolver<T>& stages, const Slots<D>& slots, int count, int64_t size,
                              int64_t step, Sweep sweep, double t, double h, T* const* origin, T* const* state,
                              Failure* failures) {
  for (int s = 0; s < count; ++s) {
    if (stages[s].solved) continue;
    if ((origin == nullptr || is_finite(size, origin[s])) && leads())
      failures[slots.first(s)] = {step, Failure::stage, sweep, t, h, stages[s].residual, stages[s].evaluations};
    fill(size, T(__builtin_nan("")), state[s]);
  }
}

}  // namespace detail

/// Carry a group from the first observation time to the last.
template <Dynamics D, class Arena>
NODESHAPE_FUNCTION void solve_forward(D& f, Arena& arena, const ForwardProblem<typename D::Scalar>& p, Group group) {
  using T = typename D::Scalar;
  const Grid& grid = p.grid;
  const Slots<D> slots(group, p.samples);
  const int64_t size = f.size(), sample = f.sample(), row_elements = p.store == kStoreStages ? f.kept() : sample;
  StageSolver<T> stages(arena, size, group.count, p.stage, grid.theta == 0.0);
  T* y[kMaxGroup];
  for (int s = 0; s < group.count; ++s) {
    y[s] = arena.template take<T>(size);
    f.read(p.y0 + slots.first(s) * sample, slots.members(s), y[s]);
    f.write(y[s], slots.members(s), p.ys + slots.first(s) * sample);
  }
  const auto stored = [&](int64_t row, int s) { return p.stored + (row * p.samples + slots.first(s)) * row_elements; };

  int64_t step = 0, row = 0;
  for (int64_t j = 0; j + 1 < grid.count; ++j) {
    const double h = (grid.times[j + 1] - grid.times[j]) / double(grid.steps[j]);
    for (int64_t k = 0; k < grid.steps[j]; ++k) {
      if (interrupted()) return;
      const double t = grid.times[j] + double(k) * h;
      const double at = t + grid.theta * h;
      stages.solve(group.count, y, grid.theta * h, at, [&](const Batch<T>& b) { f.eval(at, b); });
      for (int s = 0; s < group.count; ++s) {
        const auto& stage = stages[s];
        if (p.store == kStoreStages) f.keep(s, stage.value, slots.members(s), stored(row, s));
        detail::add(size, T(h), stage.slope, y[s]);
      }
      detail::judge(stages, slots, group.count, size, step, Sweep::forward, t, h, static_cast<T* const*>(nullptr), y,
                    p.failures);
      ++step;
      const bool checkpoint = p.store > 0 && (k + 1) % p.store == 0 && k + 1 < grid.steps[j];
      if (checkpoint)
        for (int s = 0; s < group.count; ++s) f.pack(y[s], slots.members(s), stored(row, s));
      if (checkpoint || p.store == kStoreStages) ++row;
    }
    for (int s = 0; s < group.count; ++s)
      f.write(y[s], slots.members(s), p.ys + ((j + 1) * p.samples + slots.first(s)) * sample);
  }
  for (int s = 0; s < group.count; ++s) {
    const auto& totals = stages.totals(s);
    slots.each(s, [&](int64_t n) {
      p.evaluations[n] = totals.evaluations;
      p.residual[n] = totals.residual;
    });
  }
}

/// The backward sweep of a group. Gradients of the parameters stay in f; those of the times are added to `grad_t`.
template <Dynamics D, class Arena>
class BackwardSweep {
  using T = typename D::Scalar;

 public:
  NODESHAPE_FUNCTION BackwardSweep(D& f, Arena& arena, const BackwardProblem<T>& p, Group group, double* grad_t)
      : f_(f),
        p_(p),
        group_(group),
        slots_(group, p.samples),
        grad_t_(grad_t),
        size_(f.size()),
        sample_(f.sample()),
        row_(p.store == kStoreStages ? f.kept() : f.sample()),
        pair_(p.adjoint == Adjoint::continuous),
        explicit_(p.grid.theta == 0.0),
        rebuilt_(arena, pair_ ? 2 * size_ : size_, group.count, p.stage, rebuilds_explicitly()),
        transposed_(arena, size_, pair_ ? 0 : group.count, p.stage, explicit_) {
    for (int s = 0; s < group.count; ++s) {
      y_[s] = arena.template take<T>(2 * size_);  // the pair (y, lambda)
      lam_[s] = y_[s] + size_;
      truth_[s] = arena.template take<T>(size_);
      slope_[s] = arena.template take<T>(size_);
    }
  }

  NODESHAPE_FUNCTION void run() {
    const Grid& grid = p_.grid;
    for (int s = 0; s < group_.count; ++s) {
      f_.read(observed(p_.ys, grid.count - 1, s), slots_.members(s), y_[s]);
      f_.read_cotangent(observed(p_.grad_ys, grid.count - 1, s), slots_.members(s), lam_[s]);
    }
    int64_t step = grid.total_steps();
    int64_t row = stored_rows(p_.store, grid);
    for (int64_t j = grid.count - 2; j >= 0; --j) {
      const double h = (grid.times[j + 1] - grid.times[j]) / double(grid.steps[j]);
      if (pair_) observe_slopes(j + 1);
      double to_h = 0, to_start = 0;  // dL/dh of the interval's steps, dL/dt of all their starts
      for (int64_t k = grid.steps[j] - 1; k >= 0; --k) {
        if (interrupted()) return;
        --step;
        const double t = grid.times[j] + double(k) * h;
        if (pair_) {
          augmented_step(step, t, h);
        } else {
          if (p_.adjoint == Adjoint::reversible) {
            rebuild_stage(step, t, h);
          } else {
            restore_stage(--row, t, h);
          }
          const auto [to_length, to_t] = transposed_step(step, t, h);
          to_h += to_length + double(k) * to_t;
          to_start += to_t;
          if (p_.adjoint == Adjoint::reversible) {
            step_back(h);
            if (p_.store > 0 && k > 0 && k % p_.store == 0) compare(step, j, t, h, --row);
          }
        }
      }
      if (!pair_) {
        add_to_time(j, to_start - to_h / double(grid.steps[j]));
        add_to_time(j + 1, to_h / double(grid.steps[j]));
      }
      arrive(j, step, grid.times[j], h);
    }
    for (int s = 0; s < group_.count; ++s) {
      f_.write(lam_[s], slots_.members(s), p_.grad_y0 + slots_.first(s) * sample_);
      const int64_t rebuilt = p_.adjoint == Adjoint::discrete ? 0 : rebuilt_.totals(s).evaluations;
      const int64_t evaluations = rebuilt + transposed_.totals(s).evaluations + observations_;
      slots_.each(s, [&](int64_t n) { p_.evaluations[n] = evaluations; });
    }
  }

 private:
  /// Stages of the sweep that finds the trajectory again are given, not solved for.
  NODESHAPE_FUNCTION bool rebuilds_explicitly() const {
    return p_.adjoint == Adjoint::discrete || (p_.adjoint == Adjoint::reversible && p_.grid.theta == 1.0) ||
           (pair_ && explicit_);
  }

  NODESHAPE_FUNCTION const T* observed(const T* tensor, int64_t j, int s) const {
    return tensor + (j * p_.samples + slots_.first(s)) * sample_;
  }
  NODESHAPE_FUNCTION const T* stored(int64_t row, int s) const {
    return p_.stored + (row * p_.samples + slots_.first(s)) * row_;
  }

  NODESHAPE_FUNCTION void judge(const StageSolver<T>& stages, int64_t size, int64_t step, Sweep sweep, double t,
                                double h, T* const* origin, T* const* state) {
    detail::judge(stages, slots_, group_.count, size, step, sweep, t, h, origin, state, p_.failures);
  }

  /// discrete: the forward solve kept the stage and what f is linearised about it with.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void restore_stage(int64_t row, double t, double h) {
    const T* rows[kMaxGroup];
    int members[kMaxGroup];
    for (int s = 0; s < group_.count; ++s) {
      rows[s] = stored(row, s);
      members[s] = slots_.members(s);
      f_.unpack(rows[s], members[s], y_[s]);
    }
    const double at = t + p_.grid.theta * h;
    rebuilt_.solve(group_.count, y_, 0.0, at, [&](const Batch<T>& b) { f_.recall(at, rows, members, b); });
  }

  /// reversible: Y = y_{k+1} - (1 - theta) h f(Y), the very stage of the forward step.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void rebuild_stage(int64_t step, double t, double h) {
    const double theta = p_.grid.theta, at = t + theta * h;
    rebuilt_.solve(group_.count, y_, -(1.0 - theta) * h, at, [&](const Batch<T>& b) { f_.eval(at, b); });
    judge(rebuilt_, size_, step, Sweep::reversed, t, h, nullptr, y_);
  }

  /// reversible: y_k = y_{k+1} - h f(Y)
  NODESHAPE_FUNCTION void step_back(double h) {
    for (int s = 0; s < group_.count; ++s) detail::add(size_, T(-h), rebuilt_[s].slope, y_[s]);
  }

  struct TimeGradient {
    double to_h, to_t;
  };

  /// w = lambda + theta h J^T w, then lambda += h J^T w; returns dL/dh and dL/dt of the step.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE TimeGradient transposed_step(int64_t step, double t, double h) {
    const double theta = p_.grid.theta, at = t + theta * h;
    transposed_.solve(group_.count, lam_, theta * h, at, [&](const Batch<T>& b) { f_.vjp(b); });
    f_.accumulate(at, h, group_.count);
    const double to_t = f_.time_product();
    const double to_h = detail::value_dot_slope(size_, group_.count, transposed_, rebuilt_) + theta * to_t;
    for (int s = 0; s < group_.count; ++s) detail::add(size_, T(h), transposed_[s].slope, lam_[s]);
    judge(transposed_, size_, step, Sweep::transposed, t, h, y_, lam_);
    return {to_h, to_t};
  }

  /// continuous (Chen et al. 2018, section 2): (y, a)' = (f, -J^T a), stepped with -h from t + h.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void augmented_step(int64_t step, double t, double h) {
    const double theta = p_.grid.theta, at = t + (1.0 - theta) * h;
    rebuilt_.solve(group_.count, y_, -theta * h, at, [&](const Batch<T>& b) {
      f_.eval(at, b);
      Batch<T> adjoints;
      for (int i = 0; i < b.count; ++i) adjoints.add(b.slot[i], b.in[i] + size_, b.out[i] + size_);
      f_.vjp(adjoints);
      for (int i = 0; i < b.count; ++i) {
        T* slope = b.out[i] + size_;
        each<T>(size_, [=](int64_t k) { store(slope + k, -load(slope + k)); });
      }
    });
    f_.accumulate(at, h, group_.count);
    for (int s = 0; s < group_.count; ++s) detail::add(2 * size_, T(-h), rebuilt_[s].slope, y_[s]);
    judge(rebuilt_, 2 * size_, step, Sweep::augmented, t + h, -h, nullptr, y_);
  }

  /// continuous: dL/dt_j = dL/dy(t_j) . f(t_j, y(t_j)), and for t_0 minus the adjoint that reached it.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void observe_slopes(int64_t j) {
    Batch<T> batch;
    for (int s = 0; s < group_.count; ++s) batch.add(s, y_[s], slope_[s]);
    f_.eval(p_.grid.times[j], batch);
    ++observations_;
    for (int s = 0; s < group_.count; ++s) {
      if (j == 0)
        add_to_time(j, -detail::dot(size_, lam_[s], slope_[s]));
      else
        add_to_time(j, detail::dot(size_, jump(j, s), slope_[s]));
    }
  }

  /// At observation time j: back to the stored trajectory, and the jump of lambda by dL/dy(t_j).
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void arrive(int64_t j, int64_t step, double t, double h) {
    if (p_.adjoint == Adjoint::reversible) compare(step, j, t, h, kObserved);
    if (pair_) {
      for (int s = 0; s < group_.count; ++s) f_.read(observed(p_.ys, j, s), slots_.members(s), y_[s]);
      if (j == 0) observe_slopes(0);
    }
    for (int s = 0; s < group_.count; ++s) detail::add(size_, T(1), jump(j, s), lam_[s]);
  }

  /// dL/dy(t_j) as the loss gives it, until the next call for this sample.
  NODESHAPE_FUNCTION const T* jump(int64_t j, int s) {
    f_.read_cotangent(observed(p_.grad_ys, j, s), slots_.members(s), truth_[s]);
    return truth_[s];
  }

  NODESHAPE_FUNCTION void add_to_time(int64_t j, double gradient) {
    if (leads()) grad_t_[j] += gradient;
  }

  static constexpr int64_t kObserved = -1;

  /// reversible: how far the rebuilt state has drifted from the stored one, from which the sweep goes on: row `row` of
  /// `stored`, or the state at observation time j.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void compare(int64_t step, int64_t j, double t, double h, int64_t row) {
    for (int s = 0; s < group_.count; ++s) {
      f_.read(observed(p_.ys, j + 1, s), slots_.members(s), slope_[s]);
      const double end = detail::dot(size_, slope_[s], slope_[s]);
      T *truth = truth_[s], *y = y_[s];
      if (row == kObserved)
        f_.read(observed(p_.ys, j, s), slots_.members(s), truth);
      else
        f_.unpack(stored(row, s), slots_.members(s), truth);
      const double square = double(total<T>(size_, [=](int64_t i) {
        const Vec<T> d = load(y + i) - load(truth + i);
        return d * d;
      }));
      const double start = detail::dot(size_, truth, truth);
      const double drift = square == 0 ? 0.0 : std::sqrt(square / (start >= end ? start : end));
      Failure& failure = p_.failures[slots_.first(s)];
      if (leads() && __builtin_isfinite(start) && !(drift <= p_.drift_tolerance) && failure.step < 0)
        failure = {step, Failure::drift, Sweep::reversed, t, h, drift, 0};
      each<T>(size_, [=](int64_t i) { store(y + i, load(truth + i)); });
    }
  }

  D& f_;
  const BackwardProblem<T>& p_;
  const Group group_;
  const Slots<D> slots_;
  double* grad_t_;
  const int64_t size_, sample_, row_;  // elements: of a slot's state, of a sample in tensors, and in `stored`
  const bool pair_, explicit_;
  int64_t observations_ = 0;   // evaluations of f at observation times
  StageSolver<T> rebuilt_;     // of the trajectory, or of the pair (y, lambda)
  StageSolver<T> transposed_;  // of w
  T* y_[kMaxGroup];
  T* lam_[kMaxGroup];
  T* truth_[kMaxGroup];  // what a tensor says
  T* slope_[kMaxGroup];  // scratch
};

}  // namespace nodeshape::NODESHAPE_TARGET
