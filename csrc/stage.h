// The stage equation Y = base + c F(Y), for a few samples side by side: Anderson acceleration as in
// nodeshape/_ode/stage.py.
//
// Written in `each` and `total`, the loops over one sample's elements that the including file brings (cpu/simd.h,
// cuda/block.cuh), and knowing nothing of what F is. Samples share calls of F and nothing else: each has its own
// history, stops at its own tolerance and fails alone, so what becomes of one does not depend on its company.
#pragma once

#include "loops.h"
#include "problem.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Iterates of history Anderson acceleration keeps.
inline constexpr int kAndersonMemory = 5;
/// The first iterate follows the line through the last two slopes where they differ by at most this part of the last.
inline constexpr double kMostTrend = 0.5;
/// That line goes on for at most so many times the distance between the two.
inline constexpr double kMostAhead = 2.0;
/// A residual difference this much shorter after orthogonalisation (relative) counts as dependent on the newer ones.
inline constexpr double kDependent = 1e-3;

/// Arguments of one call of a function of a few samples: out[i] = F(in[i]). `slot` numbers the sample within its group.
template <class T>
struct Batch {
  int count = 0;
  int slot[kMaxGroup];
  const T* in[kMaxGroup];
  T* out[kMaxGroup];

  NODESHAPE_FUNCTION void add(int s, const T* from, T* to) {
    slot[count] = s;
    in[count] = from;
    out[count++] = to;
  }
};

template <class T>
class StageSolver {
 public:
  /// One sample's stage: Y = value, F(Y) = slope.
  struct Stage {
    const T* value;
    T* slope;
    int64_t evaluations;
    double residual;  // relative
    bool solved;      // to the tolerance, or its base is not finite: such a sample propagates like any NaN
  };

  /// Over all of one sample's stages so far.
  struct Totals {
    int64_t evaluations = 0;
    double residual = 0;  // the largest
  };

  /// `size` elements per sample, a multiple of the vector; `is_explicit` if every stage is its base, c = 0.
  template <class Arena>
  NODESHAPE_FUNCTION StageSolver(Arena& arena, int64_t size, int group, StageOptions options, bool is_explicit)
      : size_(size), options_(options), explicit_(is_explicit) {
    for (int s = 0; s < group; ++s) {
      Sample& sample = samples_[s];
      sample.stage.slope = arena.template take<T>(size);
      if (explicit_) continue;
      sample.before = arena.template take<T>(size);
      sample.value = arena.template take<T>(size);
      sample.residual = arena.template take<T>(size);
      for (int m = 0; m < kAndersonMemory; ++m) {
        sample.difference[m] = arena.template take<T>(size);
        sample.move[m] = arena.template take<T>(size);
      }
    }
    if (explicit_) return;
    step_ = arena.template take<T>(size);
    rest_ = arena.template take<T>(size);
    for (int m = 0; m < kAndersonMemory; ++m) {
      q_[m] = arena.template take<T>(size);
      x_[m] = arena.template take<T>(size);
    }
  }

  NODESHAPE_FUNCTION const Stage& operator[](int s) const { return samples_[s].stage; }
  NODESHAPE_FUNCTION const Totals& totals(int s) const { return samples_[s].totals; }

  /// Solve for samples 0 ... count - 1. The last call of `function` for a sample is at the Y it ends with.
  ///
  /// The slopes are taken for a smooth function of `at`, where the first iterate of a stage comes from the two before
  /// it; in stages of several kinds, whose `at` is NaN, from the one before.
  template <class Function>
  NODESHAPE_FUNCTION void solve(int count, T* const* base, double c, double at, Function&& function) {
    Batch<T> batch;
    if (explicit_) {
      for (int s = 0; s < count; ++s) {
        Stage& stage = samples_[s].stage;
        stage = {base[s], stage.slope, 1, 0.0, true};
        batch.add(s, stage.value, stage.slope);
      }
      function(batch);
    } else {
      const double ahead = stages_ < 2 ? 0.0 : (at - at_[0]) / (at_[0] - at_[1]);
      for (int s = 0; s < count; ++s) {
        begin(samples_[s], base[s], T(c), ahead > 0 && ahead <= kMostAhead ? T(ahead) : T(0));
        batch.add(s, samples_[s].value, samples_[s].stage.slope);
      }
      while (batch.count > 0) {
        function(batch);
        const Batch<T> evaluated = batch;
        batch.count = 0;
        for (int i = 0; i < evaluated.count; ++i) {
          Sample& sample = samples_[evaluated.slot[i]];
          if (finished(sample, T(c))) continue;
          propose(sample);
          batch.add(evaluated.slot[i], sample.value, sample.stage.slope);
        }
      }
    }
    at_[1] = at_[0];
    at_[0] = at;
    ++stages_;
    for (int s = 0; s < count; ++s) {
      const Stage& stage = samples_[s].stage;
      Totals& totals = samples_[s].totals;
      totals.evaluations += stage.evaluations;
      if (!(stage.residual <= totals.residual)) totals.residual = stage.residual;
    }
  }

 private:
  struct Sample {
    Stage stage{};
    Totals totals{};
    const T* base;
    T* before;  // the slope of the stage before
    T* value;
    T* residual;
    T* difference[kAndersonMemory];  // of residuals, the newest first
    T* move[kAndersonMemory];        // of Y, that made them
    int history;                     // differences in use
    bool broken;                     // whether the base is not finite
    double base_norm;
    double length;  // of the latest residual
    double mixing;  // share of what the secants do not predict that is mixed in
  };

  NODESHAPE_FUNCTION double norm(const T* x) const {
    return root(double(total<T>(size_, [=](int64_t i) { return load(x + i) * load(x + i); })), x);
  }

  /// The norm of x, given the sum of its squares, which may have overflowed or underflowed.
  NODESHAPE_FUNCTION double root(double square, const T* x) const {
    if (square > 1e-25 && square < 1e25) return square_root<T>(square);
    const double peak = double(largest<T>(size_, [=](int64_t i) { return load(x + i); }));
    if (!(peak > 0)) return square;
    const Vec<T> scale = splat(T(peak));
    return peak * square_root<T>(double(total<T>(size_, [=](int64_t i) {
             const Vec<T> unit = load(x + i) / scale;
             return unit * unit;
           })));
  }

  /// The first iterate; the last slope becomes the one before.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void begin(Sample& sample, const T* base, T c, T ahead) {
    T *value = sample.value, *slope = sample.stage.slope, *before = sample.before;
    const Vec<T> factor = splat(c);
    if (stages_ == 0) {
      each<T>(size_, [=](int64_t i) { store(value + i, load(base + i)); });
    } else if (ahead != T(0) && is_trend(slope, before, ahead)) {
      const Vec<T> further = splat(ahead);
      each<T>(size_, [=](int64_t i) {
        const Vec<T> last = load(slope + i), next = fma(further, last - load(before + i), last);
        store(value + i, fma(factor, next, load(base + i)));
      });
    } else {
      each<T>(size_, [=](int64_t i) { store(value + i, fma(factor, load(slope + i), load(base + i))); });
    }
    sample.before = slope;
    sample.stage = {value, before, 0, 0.0, false};
    sample.base = base;
    sample.base_norm = norm(base);
    sample.broken = !__builtin_isfinite(sample.base_norm);
    sample.history = 0;
    sample.mixing = 1.0;
  }

  /// Whether the line through two slopes is worth following, `ahead` times as far as they lie apart.
  NODESHAPE_FUNCTION bool is_trend(const T* last, const T* before, T ahead) const {
    const double change = double(total<T>(size_, [=](int64_t i) {
      const Vec<T> d = load(last + i) - load(before + i);
      return d * d;
    }));
    const double length = double(total<T>(size_, [=](int64_t i) { return load(last + i) * load(last + i); }));
    return double(ahead) * double(ahead) * change <= kMostTrend * kMostTrend * length;
  }

  /// Take in a new F(Y): the residual, and whether the iteration ends here.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE bool finished(Sample& sample, T c) {
    const T *base = sample.base, *value = sample.value, *slope = sample.stage.slope;
    T *residual = sample.residual, *difference = sample.difference[0];
    const Vec<T> factor = splat(c);
    const auto renew = [=](int64_t i) {
      const Vec<T> r = fma(factor, load(slope + i), load(base + i)) - load(value + i);
      store(residual + i, r);
      return r;
    };
    T square;
    if (sample.history > 0)
      square = total<T>(size_, [=](int64_t i) {
        const Vec<T> before = load(residual + i), r = renew(i);
        store(difference + i, r - before);
        return r * r;
      });
    else
      square = total<T>(size_, [=](int64_t i) {
        const Vec<T> r = renew(i);
        return r * r;
      });

    Stage& stage = sample.stage;
    ++stage.evaluations;
    const double length = root(double(square), residual);
    if (sample.history > 0 && length > 2.0 * sample.length) sample.mixing *= 0.5;
    sample.length = length;
    const double value_norm = norm(value);
    const double scale = sample.base_norm >= value_norm ? sample.base_norm : value_norm;
    stage.residual = length > 0 ? length / scale : length;  // infinite if all but the residual is zero
    stage.solved = stage.residual <= options_.tolerance || sample.broken;
    return stage.solved || __builtin_isnan(stage.residual) || stage.evaluations >= options_.max_iterations;
  }

  /// Y += the moves that the residual's part in the span of the differences calls for, and the rest of it, or less of
  /// the rest by half each time the residual has more than doubled. Modified Gram-Schmidt, the newest difference first,
  /// so that old ones never spoil new ones.
  NODESHAPE_FUNCTION NODESHAPE_OUTLINE void propose(Sample& sample) {
    const T* residual = sample.residual;
    T *value = sample.value, *step = step_, *rest = rest_;
    each<T>(size_, [=](int64_t i) {
      store(step + i, splat(T(0)));
      store(rest + i, load(residual + i));
    });
    int columns = 0;
    for (int k = 0; k < sample.history; ++k) {
      T *q = q_[columns], *x = x_[columns];
      if (!orthonormalise(sample.difference[k], sample.move[k], columns, q, x)) continue;
      ++columns;
      const Vec<T> along = splat(total<T>(size_, [=](int64_t i) { return load(q + i) * load(rest + i); }));
      each<T>(size_, [=](int64_t i) {
        store(rest + i, load(rest + i) - along * load(q + i));
        store(step + i, load(step + i) - along * load(x + i));
      });
    }
    remember(sample);
    T* move = sample.move[0];
    const Vec<T> mixing = splat(T(sample.mixing));
    each<T>(size_, [=](int64_t i) {
      const Vec<T> moved = fma(mixing, load(rest + i), load(step + i));
      store(move + i, moved);
      store(value + i, load(value + i) + moved);
    });
  }

  /// (q, x) = (difference, move), made orthonormal in q to the first `columns` of (q_, x_); false if nothing is left.
  NODESHAPE_FUNCTION bool orthonormalise(const T* difference, const T* move, int columns, T* q, T* x) {
    const double whole = norm(difference);
    each<T>(size_, [=](int64_t i) {
      store(q + i, load(difference + i));
      store(x + i, load(move + i));
    });
    for (int m = 0; m < columns; ++m) {
      const T *newer_q = q_[m], *newer_x = x_[m];
      const Vec<T> overlap = splat(total<T>(size_, [=](int64_t i) { return load(newer_q + i) * load(q + i); }));
      each<T>(size_, [=](int64_t i) {
        store(q + i, load(q + i) - overlap * load(newer_q + i));
        store(x + i, load(x + i) - overlap * load(newer_x + i));
      });
    }
    const double length = columns ? norm(q) : whole;
    if (!(length > kDependent * whole) || !__builtin_isfinite(length)) return false;
    const Vec<T> inverse = splat(reciprocal<T>(length));
    each<T>(size_, [=](int64_t i) {
      store(q + i, load(q + i) * inverse);
      store(x + i, load(x + i) * inverse);
    });
    return true;
  }

  /// Make room for the newest difference at the front, in place of the oldest once the history is full.
  NODESHAPE_FUNCTION void remember(Sample& sample) {
    const int last = sample.history < kAndersonMemory ? sample.history++ : kAndersonMemory - 1;
    T *difference = sample.difference[last], *move = sample.move[last];
    for (int m = last; m > 0; --m) {
      sample.difference[m] = sample.difference[m - 1];
      sample.move[m] = sample.move[m - 1];
    }
    sample.difference[0] = difference;
    sample.move[0] = move;
  }

  int64_t size_;
  StageOptions options_;
  const bool explicit_;
  Sample samples_[kMaxGroup];
  T *step_, *rest_, *q_[kAndersonMemory], *x_[kAndersonMemory];  // of the sample at hand
  int64_t stages_ = 0;                                           // so far
  double at_[2] = {};                                            // where the last two were
};

}  // namespace nodeshape::NODESHAPE_TARGET
