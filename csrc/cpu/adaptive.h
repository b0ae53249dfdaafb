// The time loop under error control, forwards and backwards (exact gradient for the steps that were taken): every
// sample takes its own steps. A few samples are stepped side by side, each in a place; one that has arrived gives its
// place to the next.
#pragma once

#include "share.h"
#include "../control.h"
#include "../dynamics.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Samples in places, and the sums of slopes that steps are made of.
template <PlacedDynamics D>
class Places {
 protected:
  using T = typename D::Scalar;
  static constexpr int kMost = D::kSamples > kMaxGroup ? D::kSamples : kMaxGroup;

  Places(D& f, Arena& arena, const Embedded& method, int slots)
      : f_(f),
        method_(method),
        stages_(int(method.tableau.stages)),
        slots_(slots),
        places_(slots * D::kSamples),
        size_(f.size()) {
    step_ = arena.zeros<T>(kMost);
    at_ = arena.zeros<T>(kMost);
    for (int p = 0; p < places_; ++p) sample_[p] = -1;
  }

  bool busy(int slot) const { return D::kSamples > 1 || sample_[slot] >= 0; }
  Batch<T> batch(T* const* in, T* const* out) const {
    Batch<T> batch;
    for (int s = 0; s < slots_; ++s)
      if (busy(s)) batch.add(s, in[s], out[s]);
    return batch;
  }

  /// F_i at to[slot] = y + h sum_j a_ij F_j.
  NODESHAPE_OUTLINE void find_stage(int i, const double* t, T* const* y, T* const* to, T* (*slopes)[kMaxGroup]) {
    for (int s = 0; s < slots_; ++s)
      if (busy(s)) advance(s, &method_.tableau.a[i * stages_], i, y[s], slopes, to[s]);
    for (int p = 0; p < places_; ++p) at_[p] = T(t[p] + method_.tableau.c[i] * double(step_[p]));
    f_.eval_at(at_, batch(to, slopes[i]));
  }

  /// to = y + h sum_{j < count} weights_j F_j
  NODESHAPE_OUTLINE void advance(int s, const double* weights, int count, const T* y, T* (*slopes)[kMaxGroup], T* to) {
    T factors[kMostStages];
    const T* x[kMostStages];
    int terms = 0;
    for (int j = 0; j < count; ++j)
      if (weights[j] != 0) {
        factors[terms] = T(weights[j]);
        x[terms++] = slopes[j][s];
      }
    each<T>(size_, [=, this](int64_t i) {
      Vec<T> sum{};
      for (int m = 0; m < terms; ++m) sum = fma(splat(factors[m]), load(x[m] + i), sum);
      store(to + i, fma(f_.factor(step_, s, i), sum, load(y + i)));
    });
  }

  /// Weights of the slopes at the part x of a step.
  void dense_weights(double x, double* weights) const {
    for (int i = 0; i < stages_; ++i) {
      double sum = 0;
      for (int k = 3; k >= 0; --k) sum = (sum + method_.dense[k * stages_ + i]) * x;
      weights[i] = sum;
    }
  }

  D& f_;
  const Embedded& method_;
  const int stages_, slots_, places_;
  const int64_t size_;
  T *step_, *at_;  // [places]: signed step and time
  int64_t sample_[kMost];
};

template <PlacedDynamics D>
class AdaptiveSolve : Places<D> {
  using Base = Places<D>;
  using T = typename D::Scalar;
  using Base::kMost, Base::f_, Base::method_, Base::stages_, Base::slots_, Base::places_, Base::size_, Base::step_,
      Base::at_, Base::sample_, Base::busy, Base::batch;

 public:
  /// Of samples [first, first + count), whose steps are recorded as those of a chunk.
  AdaptiveSolve(D& f, Arena& arena, const AdaptiveProblem<T>& problem, const Embedded& method, int slots, int64_t chunk,
                int64_t first, int64_t count)
      : Base(f, arena, method, slots),
        p_(problem),
        chunk_(chunk),
        next_(first),
        end_(first + count),
        first_(first),
        sign_(problem.times[problem.count - 1] > problem.times[0] ? 1.0 : -1.0) {
    for (int s = 0; s < slots; ++s) {
      y_[s] = arena.zeros<T>(size_);
      stage_[s] = arena.zeros<T>(size_);
      y_end_[s] = arena.zeros<T>(size_);
    }
    for (int i = 0; i < stages_; ++i)
      for (int s = 0; s < slots; ++s) slope_[i][s] = arena.zeros<T>(size_);
    kept_ = arena.zeros<T>(kMost);
    first_slopes_ = arena.take<T>(count * f.sample());
    first_steps_ = arena.take<double>(count);
  }

  void run() {
    for (int64_t n = first_; n < end_; n += places_) begin(n, int(smaller(places_, end_ - n)));
    for (int p = 0; p < places_; ++p) sample_[p] = -1;
    for (int p = 0; p < places_; ++p) take_next(p);
    for (int p = 0; p < places_ && D::kSamples > 1; ++p)
      if (sample_[p] < 0 && sample_[0] >= 0) {  // a harmless state for a lane that has no sample
        load_sample(sample_[0], p);
        t_[p] = t_[0];
      }
    while (active_ > 0 && !interrupted()) attempt();
  }

 private:
  // ---- the first step -----------------------------------------------------------------------------------------------

  /// Slopes at the start, and the first steps (Hairer, Norsett & Wanner I, II.4).
  NODESHAPE_OUTLINE void begin(int64_t n, int members) {
    const int64_t sample = f_.sample();
    for (int p = 0; p < places_; ++p) {
      sample_[p] = n + smaller(p, members - 1);
      f_.put(p_.y0 + sample_[p] * sample, p, y_);
      at_[p] = T(p_.times[0]);
    }
    f_.eval_at(at_, batch(y_, slope_[0]));
    for (int p = 0; p < members; ++p) f_.get(slope_[0], p, first_slopes_ + (n + p - first_) * sample);
    double finite[kMost], h[kMost], speed[kMost], size[kMost], bend[kMost];
    const Control& control = p_.control;
    const Vec<T> rtol = splat(T(control.rtol)), atol = splat(T(control.atol));
    const auto mean = [=](double sum) { return std::sqrt(sum / double(larger(sample, 1))); };
    for (int s = 0; s < slots_; ++s) {
      const T *y = y_[s], *slope = slope_[0][s];
      const auto scale = [=](int64_t i) { return fma(rtol, max(load(y + i), -load(y + i)), atol); };
      const int p = s * D::kSamples;
      f_.sums(s, [=](int64_t i) { return load(y + i) * splat(T(0)); }, finite + p);
      f_.sums(s, [=](int64_t i) { return square(load(y + i) / scale(i)); }, size + p);
      f_.sums(s, [=](int64_t i) { return square(load(slope + i) / scale(i)); }, speed + p);
    }
    for (int p = 0; p < places_; ++p) {
      size[p] = mean(size[p]);
      speed[p] = mean(speed[p]);
      h[p] = size[p] < 1e-5 || speed[p] < 1e-5 ? 1e-6 : 0.01 * size[p] / speed[p];
      if (!(h[p] < 1e300)) h[p] = 1e-6;
      if (control.first_step > 0) h[p] = control.first_step;
      step_[p] = T(sign_ * h[p]);
      at_[p] = T(p_.times[0] + sign_ * h[p]);
    }
    if (control.first_step == 0) {
      for (int s = 0; s < slots_; ++s) {
        const T *y = y_[s], *slope = slope_[0][s];
        T* to = stage_[s];
        each<T>(size_,
                [=, this](int64_t i) { store(to + i, fma(f_.factor(step_, s, i), load(slope + i), load(y + i))); });
      }
      f_.eval_at(at_, batch(stage_, slope_[1]));
      for (int s = 0; s < slots_; ++s) {
        const T *y = y_[s], *slope = slope_[0][s], *after = slope_[1][s];
        f_.sums(
            s,
            [=](int64_t i) {
              const Vec<T> scale = fma(rtol, max(load(y + i), -load(y + i)), atol);
              return square((load(after + i) - load(slope + i)) / scale);
            },
            bend + s * D::kSamples);
      }
      for (int p = 0; p < places_; ++p) {
        const double steepest = larger_number(speed[p], mean(bend[p]) / h[p]);
        const double small = larger_number(h[p] * 1e-3, 1e-6);
        const double guess = steepest <= 1e-15 ? small : std::pow(0.01 / steepest, 1.0 / double(control.order));
        if (guess < 100 * h[p])
          h[p] = guess;
        else if (guess < 1e300)
          h[p] = 100 * h[p];
      }
    }
    for (int p = 0; p < members; ++p) {
      const int64_t at = n + p;
      first_steps_[at - first_] = bounded(h[p]);
      p_.outcomes[at] = int64_t(finite[p] == 0 ? Outcome::arrived : Outcome::not_finite);
      p_.failures[2 * at] = p_.times[0];
      p_.failures[2 * at + 1] = __builtin_inf();
      p_.accepted[at] = p_.rejected[at] = 0;
      p_.evaluations[at] = control.first_step > 0 ? 1 : 2;
      p_.last[at] = -1;
      __builtin_memcpy(p_.ys + at * sample, p_.y0 + at * sample, sample * sizeof(T));
      if (finite[p] != 0) lose(at, 1);
    }
  }

  double bounded(double h) const {
    const double least = h < p_.control.min_step ? p_.control.min_step : h;
    return least > p_.control.max_step ? p_.control.max_step : least;
  }
  static double larger_number(double a, double b) { return a > b ? a : b; }
  static Vec<T> square(Vec<T> x) { return x * x; }

  // ---- places -------------------------------------------------------------------------------------------------------

  void load_sample(int64_t n, int p) {
    f_.put(p_.y0 + n * f_.sample(), p, y_);
    f_.put(first_slopes_ + (n - first_) * f_.sample(), p, slope_[0]);
  }

  /// Put the next sample into a place; it stays empty if there is none.
  void take_next(int p) {
    if (sample_[p] >= 0) --active_;
    sample_[p] = -1;
    while (next_ < end_ && p_.outcomes[next_] != int64_t(Outcome::arrived)) ++next_;
    if (next_ == end_) return;
    const int64_t n = next_++;
    load_sample(n, p);
    sample_[p] = n;
    t_[p] = p_.times[0];
    h_[p] = first_steps_[n - first_];
    rejected_[p] = false;
    attempts_[p] = 0;
    observed_[p] = 1;
    before_[p] = -1;
    ++active_;
  }

  /// The states of a sample from an observation on are unknown.
  void lose(int64_t n, int64_t from) {
    const int64_t sample = f_.sample();
    for (int64_t j = from; j < p_.count; ++j)
      for (int64_t e = 0; e < sample; ++e) p_.ys[(j * p_.samples + n) * sample + e] = T(__builtin_nan(""));
  }

  // ---- one attempt of every place -----------------------------------------------------------------------------------

  NODESHAPE_OUTLINE void attempt() {
    const double last = p_.times[p_.count - 1];
    double size[kMost], target[kMost];
    for (int p = 0; p < places_; ++p) {
      size[p] = 0;
      target[p] = t_[p];
      if (sample_[p] >= 0) {
        const double rest = sign_ * (last - t_[p]);
        const bool cut = h_[p] >= rest * (1 - 1e-9);
        size[p] = cut ? rest : h_[p];
        target[p] = cut ? last : t_[p] + sign_ * size[p];
      }
      step_[p] = T(target[p] - t_[p]);
    }
    for (int i = 1; i < stages_; ++i) this->find_stage(i, t_, y_, i + 1 < stages_ ? stage_ : y_end_, slope_);
    double ratio[kMost];
    for (int s = 0; s < slots_; ++s)
      if (busy(s)) errors(s, ratio + s * D::kSamples);
    int keeping = 0;
    bool ended[kMost];
    for (int p = 0; p < places_; ++p) {
      ended[p] = false;
      kept_[p] = 0;
      if (sample_[p] < 0) continue;
      ratio[p] = std::sqrt(ratio[p] / double(larger(f_.sample(), 1)));
      if (!(ratio[p] < __builtin_inf())) ratio[p] = __builtin_inf();
      const bool good = ratio[p] <= 1.0 || size[p] <= p_.control.min_step;
      const bool keep = good && ratio[p] < __builtin_inf() && target[p] != t_[p];
      kept_[p] = T(keep);
      keeping += keep;
      ended[p] = judge(p, keep, size[p], target[p], ratio[p]);
    }
    if (keeping == places_) {
      for (int s = 0; s < slots_; ++s) {
        exchange(y_[s], y_end_[s]);
        exchange(slope_[0][s], slope_[stages_ - 1][s]);
      }
    } else if (keeping > 0) {
      for (int s = 0; s < slots_; ++s)
        if (busy(s)) {
          choose(s, y_end_[s], y_[s]);
          choose(s, slope_[stages_ - 1][s], slope_[0][s]);
        }
    }
    for (int p = 0; p < places_; ++p)
      if (ended[p]) take_next(p);
  }

  /// Sums of squares of the errors in units of the tolerance.
  NODESHAPE_OUTLINE void errors(int s, double* out) {
    T factors[kMostStages];
    const T* x[kMostStages];
    int terms = 0;
    for (int j = 0; j < stages_; ++j)
      if (method_.error[j] != 0) {
        factors[terms] = T(method_.error[j]);
        x[terms++] = slope_[j][s];
      }
    const T *y = y_[s], *y_end = y_end_[s];
    const Vec<T> rtol = splat(T(p_.control.rtol)), atol = splat(T(p_.control.atol));
    f_.sums(
        s,
        [=, this](int64_t i) {
          Vec<T> sum{};
          for (int m = 0; m < terms; ++m) sum = fma(splat(factors[m]), load(x[m] + i), sum);
          const Vec<T> a = load(y + i), b = load(y_end + i);
          const Vec<T> most = max(max(a, -a), max(b, -b));
          return square(f_.factor(step_, s, i) * sum / fma(rtol, most, atol));
        },
        out);
  }

  NODESHAPE_OUTLINE void choose(int s, const T* from, T* to) {
    each<T>(size_, [=, this](int64_t i) {
      store(to + i, f_.factor(kept_, s, i) > splat(T(0)) ? load(from + i) : load(to + i));
    });
  }
  static void exchange(T*& a, T*& b) {
    T* const c = a;
    a = b;
    b = c;
  }

  /// Take in a place's attempt; whether its sample is done with, arrived or not.
  bool judge(int p, bool keep, double size, double target, double ratio) {
    const Control& control = p_.control;
    const int64_t n = sample_[p];
    const double now = t_[p];
    ++attempts_[p];
    p_.evaluations[n] += stages_ - 1;
    (keep ? p_.accepted : p_.rejected)[n] += 1;
    const double bounded_ratio = ratio < 1e-10 ? 1e-10 : ratio > 1e10 ? 1e10 : ratio;
    double factor = control.safety * std::pow(bounded_ratio, -1.0 / double(control.order));
    factor = factor < control.shrink ? control.shrink : factor > control.grow ? control.grow : factor;
    if (rejected_[p] && ratio <= 1.0 && factor > 1.0) factor = 1.0;
    const double proposed = bounded(size * factor);
    rejected_[p] = !keep;
    // A step cut short says nothing against the longer one.
    h_[p] = keep && size < h_[p] ? larger_number(h_[p], proposed) : proposed;
    if (keep) {
      if (p_.more != nullptr) record(p, target);
      observe(p, target);
      t_[p] = target;
      if (target == p_.times[p_.count - 1]) {
        p_.last[n] = before_[p];
        return true;
      }
    }
    const bool many = attempts_[p] >= control.most_attempts;
    if (target != now && !(!keep && size <= control.min_step) && !many) return false;
    p_.outcomes[n] = int64_t(many ? Outcome::too_many_attempts : Outcome::too_small_steps);
    p_.failures[2 * n] = t_[p];
    p_.failures[2 * n + 1] = ratio;
    p_.last[n] = before_[p];
    lose(n, observed_[p]);
    return true;
  }

  void record(int p, double target) {
    const int64_t row = recorded_ % Slab<T>::kSteps;
    if (row == 0) p_.more(p_.context, chunk_, &slab_);
    f_.get(y_, p, slab_.states + row * f_.sample());
    slab_.spans[2 * row] = t_[p];
    slab_.spans[2 * row + 1] = target;
    slab_.before[row] = before_[p];
    before_[p] = recorded_++;
  }

  /// Enter the states at the observation times that a step passes or ends at.
  void observe(int p, double target) {
    const int64_t sample = f_.sample();
    for (int64_t& j = observed_[p]; j < p_.count && sign_ * p_.times[j] <= sign_ * target; ++j) {
      T* to = p_.ys + (j * p_.samples + sample_[p]) * sample;
      if (p_.times[j] == target) {
        f_.get(y_end_, p, to);
        attempts_[p] = 0;
        continue;
      }
      double weights[kMostStages];
      const double h = target - t_[p];
      this->dense_weights((p_.times[j] - t_[p]) / h, weights);
      f_.get(y_, p, to);
      for (int i = 0; i < stages_; ++i)
        if (weights[i] != 0) f_.add(slope_[i], p, T(h * weights[i]), to);
    }
  }

  const AdaptiveProblem<T>& p_;
  const int64_t chunk_;
  int64_t next_;
  const int64_t end_, first_;
  const double sign_;
  int active_ = 0;
  int64_t recorded_ = 0;
  Slab<T> slab_{};
  double t_[kMost], h_[kMost];
  bool rejected_[kMost];
  int64_t attempts_[kMost], observed_[kMost], before_[kMost];
  T *y_[kMaxGroup], *stage_[kMaxGroup], *y_end_[kMaxGroup];
  T* slope_[kMostStages][kMaxGroup];
  T* kept_;              // [places], 1 where the step is kept
  T* first_slopes_;      // [samples of the chunk, sample]
  double* first_steps_;  // [samples of the chunk]
};

/// The backward sweep of a chunk of samples, each through its own steps. Gradients of the parameters stay in f.
template <PlacedDynamics D>
class AdaptiveSweep : Places<D> {
  using Base = Places<D>;
  using T = typename D::Scalar;
  using Base::kMost, Base::f_, Base::method_, Base::stages_, Base::slots_, Base::places_, Base::size_, Base::step_,
      Base::sample_, Base::busy, Base::batch;

 public:
  AdaptiveSweep(D& f, Arena& arena, const AdaptiveBackwardProblem<T>& problem, const Embedded& method, int slots,
                int64_t first, int64_t count)
      : Base(f, arena, method, slots),
        p_(problem),
        next_(first),
        end_(first + count),
        sign_(problem.times[problem.count - 1] > problem.times[0] ? 1.0 : -1.0) {
    for (int s = 0; s < slots; ++s) {
      y_[s] = arena.zeros<T>(size_);
      lam_[s] = arena.zeros<T>(size_);
      w_[s] = arena.zeros<T>(size_);
      for (int i = 0; i < stages_; ++i) {
        stage_[i][s] = arena.zeros<T>(size_);
        slope_[i][s] = arena.zeros<T>(size_);
        pulled_[i][s] = arena.zeros<T>(size_);
        inside_[i][s] = arena.zeros<T>(size_);
      }
    }
    found_ = arena.take<T>(f.sample());
    for (int p = 0; p < kMost; ++p) t_[p] = 0;
  }

  void run() {
    for (int p = 0; p < places_; ++p) take_next(p);
    for (int p = 0; p < places_ && D::kSamples > 1; ++p)
      if (sample_[p] < 0 && sample_[0] >= 0) {  // a harmless state for a lane that has no sample
        f_.put(p_.states + step_number_[0] * f_.sample(), p, y_);
        t_[p] = p_.spans[2 * step_number_[0]];
      }
    while (active_ > 0 && !interrupted()) undo();
  }

 private:
  const T* cotangent(int64_t j, int64_t n) const { return p_.grad_ys + (j * p_.samples + n) * f_.sample(); }

  /// Put the next sample into a place, with what reaches the end of its last step.
  void take_next(int p) {
    if (sample_[p] >= 0) --active_;
    sample_[p] = -1;
    step_[p] = 0;
    for (; next_ < end_; ++next_) {
      const int64_t n = next_, sample = f_.sample();
      p_.evaluations[n] = 0;
      if (p_.last[n] >= 0) break;
      __builtin_memcpy(p_.grad_y0 + n * sample, cotangent(0, n), sample * sizeof(T));
    }
    for (int64_t e = 0; e < f_.sample(); ++e) found_[e] = 0;
    f_.put(found_, p, lam_);
    if (next_ == end_) return;
    sample_[p] = next_++;
    step_number_[p] = p_.last[sample_[p]];
    observed_[p] = p_.count - 1;
    const double end = p_.spans[2 * step_number_[p] + 1];
    while (sign_ * p_.times[observed_[p]] > sign_ * end) --observed_[p];  // of a sample that did not arrive
    ++active_;
  }

  /// One step of every place.
  NODESHAPE_OUTLINE void undo() {
    bool dense = false;
    for (int p = 0; p < places_; ++p) {
      if (sample_[p] < 0) continue;
      const int64_t k = step_number_[p];
      t_[p] = p_.spans[2 * k];
      step_[p] = T(p_.spans[2 * k + 1] - t_[p]);
      f_.put(p_.states + k * f_.sample(), p, y_);
      if (p_.times[observed_[p]] == p_.spans[2 * k + 1]) {
        f_.add_to(cotangent(observed_[p], sample_[p]), p, T(1), lam_);
        --observed_[p];
      }
      if (sign_ * p_.times[observed_[p]] > sign_ * t_[p]) dense = true;
    }
    bool used[kMostStages];
    depends(dense, used);
    for (int i = 0; i < stages_; ++i) {
      if (!used[i]) continue;
      f_.record(i);
      this->find_stage(i, t_, y_, stage_[i], slope_);
    }
    if (dense) gather_inside();
    int pulls = 0;
    for (int i = stages_ - 1; i >= 0; --i) {
      if (!used[i]) continue;
      f_.record(i);
      for (int s = 0; s < slots_; ++s)
        if (busy(s)) weigh(i, s, used, dense);
      f_.pull(batch(w_, pulled_[i]));
      ++pulls;
    }
    for (int s = 0; s < slots_; ++s)
      if (busy(s)) {
        T* lam = lam_[s];
        for (int i = 0; i < stages_; ++i)
          if (used[i]) {
            const T* v = pulled_[i][s];
            each<T>(size_, [=](int64_t e) { store(lam + e, load(lam + e) + load(v + e)); });
          }
      }
    for (int p = 0; p < places_; ++p) {
      if (sample_[p] < 0) continue;
      const int64_t n = sample_[p];
      p_.evaluations[n] += pulls;
      while (sign_ * p_.times[observed_[p]] > sign_ * t_[p]) {  // which the state at the start is a part of
        f_.add_to(cotangent(observed_[p], n), p, T(1), lam_);
        --observed_[p];
      }
      step_number_[p] = p_.before[step_number_[p]];
      if (step_number_[p] >= 0) continue;
      f_.add_to(cotangent(0, n), p, T(1), lam_);
      f_.get(lam_, p, p_.grad_y0 + n * f_.sample());
      take_next(p);
    }
  }

  /// Which stages the end of a step depends on; with `dense`, what lies inside of it.
  void depends(bool dense, bool* used) const {
    const Tableau& tableau = method_.tableau;
    for (int i = stages_ - 1; i >= 0; --i) {
      used[i] = tableau.b[i] != 0;
      for (int k = 0; k < 4 && dense; ++k) used[i] = used[i] || method_.dense[k * stages_ + i] != 0;
      for (int j = i + 1; j < stages_; ++j) used[i] = used[i] || (tableau.at(j, i) != 0 && used[j]);
    }
  }

  /// inside_i = h sum w_i(x) dL/dy(x) over the observations inside of the steps.
  NODESHAPE_OUTLINE void gather_inside() {
    for (int i = 0; i < stages_; ++i)
      for (int s = 0; s < slots_; ++s) __builtin_memset(inside_[i][s], 0, size_ * sizeof(T));
    for (int p = 0; p < places_; ++p) {
      if (sample_[p] < 0) continue;
      const double h = p_.spans[2 * step_number_[p] + 1] - t_[p];
      for (int64_t j = observed_[p]; sign_ * p_.times[j] > sign_ * t_[p]; --j) {
        double weights[kMostStages];
        this->dense_weights((p_.times[j] - t_[p]) / h, weights);
        for (int i = 0; i < stages_; ++i)
          if (weights[i] != 0) f_.add_to(cotangent(j, sample_[p]), p, T(h * weights[i]), inside_[i]);
      }
    }
  }

  /// w_i = h b_i lambda + h sum_{j > i} a_ji v_j + what comes from inside of the step
  NODESHAPE_OUTLINE void weigh(int i, int s, const bool* used, bool dense) {
    T factors[kMostStages + 1];
    const T* x[kMostStages + 1];
    int terms = 0;
    if (method_.tableau.b[i] != 0) {
      factors[terms] = T(method_.tableau.b[i]);
      x[terms++] = lam_[s];
    }
    for (int j = i + 1; j < stages_; ++j)
      if (used[j] && method_.tableau.at(j, i) != 0) {
        factors[terms] = T(method_.tableau.at(j, i));
        x[terms++] = pulled_[j][s];
      }
    const T* inside = dense ? inside_[i][s] : nullptr;
    T* w = w_[s];
    each<T>(size_, [=, this](int64_t e) {
      Vec<T> sum{};
      for (int m = 0; m < terms; ++m) sum = fma(splat(factors[m]), load(x[m] + e), sum);
      store(w + e, fma(f_.factor(step_, s, e), sum, inside == nullptr ? Vec<T>{} : load(inside + e)));
    });
  }

  const AdaptiveBackwardProblem<T>& p_;
  int64_t next_;
  const int64_t end_;
  const double sign_;
  int active_ = 0;
  double t_[kMost];
  int64_t step_number_[kMost], observed_[kMost];
  T *y_[kMaxGroup], *lam_[kMaxGroup], *w_[kMaxGroup];
  T* stage_[kMostStages][kMaxGroup];
  T* slope_[kMostStages][kMaxGroup];
  T* pulled_[kMostStages][kMaxGroup];
  T* inside_[kMostStages][kMaxGroup];
  T* found_;  // [sample]
};

}  // namespace nodeshape::NODESHAPE_TARGET
