// The time loop of any diagonally implicit tableau, forwards and backwards (exact gradient), for a few samples side by
// side:
//
//     Y_i = y_k + h sum_{j<i} a_ij F_j + h a_ii F_i,   F_i = f(t_k + c_i h, Y_i),   y_{k+1} = y_k + h sum_i b_i F_i
//
//     w_i = h b_i lambda + h sum_{j>i} a_ji v_j + h a_ii v_i,   v_i = J_i^T w_i,   lambda_k = lambda + sum_i v_i
//     dL/dp += (df/dp)_i^T w_i,   dL/dh += sum_i (w_i . F_i / h + c_i w_i . df/dt),   dL/dt_k += sum_i w_i . df/dt
//
// What a step keeps is the state it starts from, from which the stages are found again; or, where stages are equations,
// all of them; or all that their evaluations left for the backward pass.
#pragma once

#include "program.h"
#include "scheme.h"

namespace nodeshape::NODESHAPE_TARGET {

namespace detail {

/// out = start + sum_m factor[m] x[m], or without `start` the sum alone.
template <class T>
NODESHAPE_FUNCTION NODESHAPE_OUTLINE void combine(int64_t size, T* out, const T* start, int count, const T* factor,
                                                  const T* const* x) {
  each<T>(size, [=](int64_t i) {
    Vec<T> sum = start == nullptr ? Vec<T>{} : load(start + i);
    for (int m = 0; m < count; ++m) sum = fma(splat(factor[m]), load(x[m] + i), sum);
    store(out + i, sum);
  });
}

/// The terms of a sum, put together one by one.
template <class T>
struct Terms {
  int count = 0;
  T factor[kMostStages + 1];
  const T* x[kMostStages + 1];

  NODESHAPE_FUNCTION void add(double a, const T* from) {
    if (a == 0) return;
    factor[count] = T(a);
    x[count++] = from;
  }
};

/// Tapes of a step's stages in `stored`, [steps, used stages, slots].
template <class D>
class Tapes {
  using T = typename D::Scalar;

 public:
  NODESHAPE_FUNCTION Tapes(const D& f, const Tableau& tableau, int64_t samples)
      : size_(f.tape()), slots_((samples + D::kSamples - 1) / D::kSamples), stages_(tableau.used_stages()) {}

  NODESHAPE_FUNCTION T* at(T* stored, int64_t step, int64_t stage, int64_t first_sample) const {
    return stored + ((step * stages_ + stage) * slots_ + first_sample / D::kSamples) * size_;
  }

 private:
  const int64_t size_, slots_, stages_;
};

}  // namespace detail

template <StagedDynamics D, class Arena>
class TableauSolve {
  using T = typename D::Scalar;

 public:
  NODESHAPE_FUNCTION TableauSolve(D& f, Arena& arena, const ForwardProblem<T>& p, const Tableau& tableau, Group group)
      : f_(f),
        p_(p),
        tableau_(tableau),
        group_(group),
        slots_(group, p.samples),
        size_(f.size()),
        explicit_(tableau.is_explicit()),
        solver_(arena, size_, group.count, p.stage, explicit_) {
    for (int s = 0; s < group.count; ++s) {
      y_[s] = arena.template take<T>(size_);
      base_[s] = arena.template take<T>(size_);
    }
    for (int64_t i = 0; i < tableau.stages; ++i) {
      used_[i] = tableau.used[i];
      for (int s = 0; s < group.count; ++s) slope_[i][s] = used_[i] ? arena.template take<T>(size_) : nullptr;
    }
  }

  NODESHAPE_FUNCTION void run() {
    const Grid& grid = p_.grid;
    const int64_t sample = f_.sample();
    for (int s = 0; s < group_.count; ++s) {
      f_.read(p_.y0 + slots_.first(s) * sample, slots_.members(s), y_[s]);
      f_.write(y_[s], slots_.members(s), p_.ys + slots_.first(s) * sample);
    }
    int64_t step = 0;
    for (int64_t j = 0; j + 1 < grid.count; ++j) {
      const double h = (grid.times[j + 1] - grid.times[j]) / double(grid.steps[j]);
      for (int64_t k = 0; k < grid.steps[j]; ++k) {
        if (interrupted()) return;
        take(step++, grid.times[j] + double(k) * h, h);
      }
      for (int s = 0; s < group_.count; ++s)
        f_.write(y_[s], slots_.members(s), p_.ys + ((j + 1) * p_.samples + slots_.first(s)) * sample);
    }
    for (int s = 0; s < group_.count; ++s) {
      const int64_t evaluations = evaluations_ + (explicit_ ? 0 : solver_.totals(s).evaluations);
      const double residual = explicit_ ? 0.0 : solver_.totals(s).residual;
      slots_.each(s, [&](int64_t n) {
        p_.evaluations[n] = evaluations;
        p_.residual[n] = residual;
      });
    }
  }

 private:
  NODESHAPE_FUNCTION void keep(int64_t row, int s, const T* y) {
    f_.keep(s, y, slots_.members(s), p_.stored + (row * p_.samples + slots_.first(s)) * f_.kept());
  }

  /// A step of a lone slot that leaves its stages' tapes.
  NODESHAPE_FUNCTION void take_taped(int64_t step, double t, double h)
    requires TapedDynamics<D>
  {
    const detail::Tapes<D> tapes(f_, tableau_, p_.samples);
    T* slope[kMostStages];
    detail::Terms<T> last;
    int64_t used = 0;
    for (int64_t i = 0; i < tableau_.stages; ++i) {
      if (!used_[i]) continue;
      T* tape = tapes.at(p_.stored, step, used++, slots_.first(0));
      detail::Terms<T> terms;
      for (int64_t j = 0; j < i; ++j)
        if (used_[j]) terms.add(h * tableau_.at(i, j), slope[j]);
      detail::combine(size_, tape, y_[0], terms.count, terms.factor, terms.x);
      f_.attach(tape);
      slope[i] = f_.slope(tape) != nullptr ? f_.slope(tape) : slope_[i][0];
      Batch<T> batch;
      batch.add(0, tape, slope[i]);
      f_.eval(t + tableau_.c[i] * h, batch);
      ++evaluations_;
      last.add(h * tableau_.b[i], slope[i]);
    }
    detail::combine(size_, y_[0], y_[0], last.count, last.factor, last.x);
  }

  NODESHAPE_FUNCTION void take(int64_t step, double t, double h) {
    if constexpr (TapedDynamics<D>)
      if (p_.store == kStoreTapes) return take_taped(step, t, h);
    const bool stores = p_.store == kStoreStages;
    if (stores && explicit_)
      for (int s = 0; s < group_.count; ++s) keep(step, s, y_[s]);
    for (int64_t i = 0; i < tableau_.stages; ++i) {
      if (!used_[i]) {  // but its row is there
        if (stores && !explicit_)
          for (int s = 0; s < group_.count; ++s) keep(step * tableau_.stages + i, s, y_[s]);
        continue;
      }
      T* stage[kMaxGroup];
      for (int s = 0; s < group_.count; ++s) {
        detail::Terms<T> terms;
        for (int64_t j = 0; j < i; ++j)
          if (used_[j]) terms.add(h * tableau_.at(i, j), slope_[j][s]);
        stage[s] = terms.count > 0 ? base_[s] : y_[s];
        if (terms.count > 0) detail::combine(size_, base_[s], y_[s], terms.count, terms.factor, terms.x);
      }
      const double at = t + tableau_.c[i] * h;
      if (tableau_.at(i, i) == 0) {
        Batch<T> batch;
        for (int s = 0; s < group_.count; ++s) batch.add(s, stage[s], slope_[i][s]);
        f_.eval(at, batch);
        ++evaluations_;
      } else {
        solver_.solve(group_.count, stage, tableau_.at(i, i) * h, at, [&](const Batch<T>& b) { f_.eval(at, b); });
        for (int s = 0; s < group_.count; ++s) {
          const T* from = solver_[s].slope;
          T* to = slope_[i][s];
          each<T>(size_, [=](int64_t e) { store(to + e, load(from + e)); });
        }
        detail::judge(solver_, slots_, group_.count, size_, step, Sweep::forward, t, h, static_cast<T* const*>(nullptr),
                      y_, p_.failures);
      }
      if (stores && !explicit_)
        for (int s = 0; s < group_.count; ++s)
          keep(step * tableau_.stages + i, s, tableau_.at(i, i) == 0 ? stage[s] : solver_[s].value);
    }
    for (int s = 0; s < group_.count; ++s) {
      detail::Terms<T> terms;
      for (int64_t i = 0; i < tableau_.stages; ++i)
        if (used_[i]) terms.add(h * tableau_.b[i], slope_[i][s]);
      detail::combine(size_, y_[s], y_[s], terms.count, terms.factor, terms.x);
    }
  }

  D& f_;
  const ForwardProblem<T>& p_;
  const Tableau& tableau_;
  const Group group_;
  const Slots<D> slots_;
  const int64_t size_;
  const bool explicit_;
  StageSolver<T> solver_;
  int64_t evaluations_ = 0;  // of explicit stages
  bool used_[kMostStages];
  T* y_[kMaxGroup];
  T* base_[kMaxGroup];
  T* slope_[kMostStages][kMaxGroup];
};

/// The backward sweep of a group: adjoint "discrete". Gradients of the parameters stay in f; those of the times are
/// added to `grad_t`, and are NaN where tapes go without the slopes that they need.
template <StagedDynamics D, class Arena>
class TableauSweep {
  using T = typename D::Scalar;

 public:
  NODESHAPE_FUNCTION TableauSweep(D& f, Arena& arena, const BackwardProblem<T>& p, const Tableau& tableau, Group group,
                                  double* grad_t)
      : f_(f),
        p_(p),
        tableau_(tableau),
        group_(group),
        slots_(group, p.samples),
        grad_t_(grad_t),
        size_(f.size()),
        explicit_(tableau.is_explicit()),
        solver_(arena, size_, group.count, p.stage, explicit_) {
    for (int s = 0; s < group.count; ++s) {
      y_[s] = arena.template take<T>(size_);
      lam_[s] = arena.template take<T>(size_);
      w_[s] = arena.template take<T>(size_);
    }
    for (int64_t i = 0; i < tableau.stages; ++i) {
      used_[i] = tableau.used[i];
      for (int s = 0; s < group.count && used_[i]; ++s) {
        stage_[i][s] = arena.template take<T>(size_);
        slope_[i][s] = arena.template take<T>(size_);
        pulled_[i][s] = arena.template take<T>(size_);
      }
    }
  }

  NODESHAPE_FUNCTION void run() {
    const Grid& grid = p_.grid;
    const int64_t sample = f_.sample();
    for (int s = 0; s < group_.count; ++s)
      f_.read_cotangent(p_.grad_ys + ((grid.count - 1) * p_.samples + slots_.first(s)) * sample, slots_.members(s),
                        lam_[s]);
    int64_t step = grid.total_steps();
    for (int64_t j = grid.count - 2; j >= 0; --j) {
      const double h = (grid.times[j + 1] - grid.times[j]) / double(grid.steps[j]);
      double to_h = 0, to_start = 0;  // dL/dh of the interval's steps, dL/dt of all their starts
      for (int64_t k = grid.steps[j] - 1; k >= 0; --k) {
        if (interrupted()) return;
        --step;
        const double t = grid.times[j] + double(k) * h;
        find_stages(step, t, h);
        double length = 0, start = 0;
        undo(step, t, h, &length, &start);
        to_h += length + double(k) * start;
        to_start += start;
      }
      if (leads()) {
        grad_t_[j] += to_start - to_h / double(grid.steps[j]);
        grad_t_[j + 1] += to_h / double(grid.steps[j]);
      }
      for (int s = 0; s < group_.count; ++s) {
        f_.read_cotangent(p_.grad_ys + (j * p_.samples + slots_.first(s)) * sample, slots_.members(s), w_[s]);
        detail::add(size_, T(1), w_[s], lam_[s]);
      }
    }
    for (int s = 0; s < group_.count; ++s) {
      f_.write(lam_[s], slots_.members(s), p_.grad_y0 + slots_.first(s) * sample);
      const int64_t evaluations = evaluations_ + (explicit_ ? 0 : solver_.totals(s).evaluations);
      slots_.each(s, [&](int64_t n) { p_.evaluations[n] = evaluations; });
    }
  }

 private:
  NODESHAPE_FUNCTION const T* kept(int64_t row, int s) const {
    return p_.stored + (row * p_.samples + slots_.first(s)) * f_.kept();
  }

  /// The stages of a step that left their tapes.
  NODESHAPE_FUNCTION void attach_stages(int64_t step)
    requires TapedDynamics<D>
  {
    const detail::Tapes<D> tapes(f_, tableau_, p_.samples);
    int64_t used = 0;
    for (int64_t i = 0; i < tableau_.stages; ++i) {
      if (!used_[i]) continue;
      T* tape = tapes.at(const_cast<T*>(p_.stored), step, used++, slots_.first(0));  // which is only read
      f_.record(int(i));
      f_.attach(tape);
      stage_[i][0] = tape;
      slope_[i][0] = f_.slope(tape);
    }
  }

  /// The stages of a step, their slopes and linearisations.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void find_stages(int64_t step, double t, double h) {
    if constexpr (TapedDynamics<D>)
      if (p_.store == kStoreTapes) return attach_stages(step);
    if (explicit_)
      for (int s = 0; s < group_.count; ++s) f_.unpack(kept(step, s), slots_.members(s), y_[s]);
    for (int64_t i = 0; i < tableau_.stages; ++i) {
      if (!used_[i]) continue;
      Batch<T> batch;
      for (int s = 0; s < group_.count; ++s) {
        T* stage = stage_[i][s];
        if (explicit_) {
          detail::Terms<T> terms;
          for (int64_t j = 0; j < i; ++j)
            if (used_[j]) terms.add(h * tableau_.at(i, j), slope_[j][s]);
          detail::combine(size_, stage, y_[s], terms.count, terms.factor, terms.x);
        } else {
          f_.unpack(kept(step * tableau_.stages + i, s), slots_.members(s), stage);
        }
        batch.add(s, stage, slope_[i][s]);
      }
      f_.record(int(i));
      f_.eval(t + tableau_.c[i] * h, batch);
    }
  }

  /// lambda_{k+1} to lambda_k.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void undo(int64_t step, double t, double h, double* to_h, double* to_start) {
    for (int64_t i = tableau_.stages - 1; i >= 0; --i) {
      if (!used_[i]) continue;
      f_.record(int(i));
      for (int s = 0; s < group_.count; ++s) {
        detail::Terms<T> terms;
        terms.add(h * tableau_.b[i], lam_[s]);
        for (int64_t j = i + 1; j < tableau_.stages; ++j)
          if (used_[j]) terms.add(h * tableau_.at(j, i), pulled_[j][s]);
        detail::combine(size_, w_[s], static_cast<const T*>(nullptr), terms.count, terms.factor, terms.x);
      }
      if (tableau_.at(i, i) != 0) {
        const double nowhere = __builtin_nan("");  // the equations of a step's stages have little in common
        solver_.solve(group_.count, w_, h * tableau_.at(i, i), nowhere, [&](const Batch<T>& b) { f_.vjp(b); });
        for (int s = 0; s < group_.count; ++s) {
          const T* from = solver_[s].value;
          T* to = w_[s];
          each<T>(size_, [=](int64_t e) { store(to + e, load(from + e)); });
        }
        detail::judge(solver_, slots_, group_.count, size_, step, Sweep::transposed, t, h, stage_[i], w_, p_.failures);
      }
      Batch<T> batch;
      for (int s = 0; s < group_.count; ++s) batch.add(s, w_[s], pulled_[i][s]);
      f_.pull(batch);
      ++evaluations_;
      const double to_t = f_.pulled_time();
      *to_start += to_t;
      *to_h += tableau_.c[i] * to_t;
      double along = 0;
      for (int s = 0; s < group_.count; ++s)
        along += slope_[i][s] == nullptr ? __builtin_nan("") : detail::dot(size_, w_[s], slope_[i][s]);
      *to_h += along / h;
    }
    for (int s = 0; s < group_.count; ++s) {
      detail::Terms<T> terms;
      for (int64_t i = 0; i < tableau_.stages; ++i)
        if (used_[i]) terms.add(1.0, pulled_[i][s]);
      detail::combine(size_, lam_[s], lam_[s], terms.count, terms.factor, terms.x);
    }
  }

  D& f_;
  const BackwardProblem<T>& p_;
  const Tableau& tableau_;
  const Group group_;
  const Slots<D> slots_;
  double* grad_t_;
  const int64_t size_;
  const bool explicit_;
  StageSolver<T> solver_;  // of w
  int64_t evaluations_ = 0;
  bool used_[kMostStages];
  T* y_[kMaxGroup];
  T* lam_[kMaxGroup];
  T* w_[kMaxGroup];
  T* stage_[kMostStages][kMaxGroup];
  T* slope_[kMostStages][kMaxGroup];
  T* pulled_[kMostStages][kMaxGroup];
};

}  // namespace nodeshape::NODESHAPE_TARGET
