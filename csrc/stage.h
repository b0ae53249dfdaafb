// The stage equation Y = base + c F(Y), for a few samples side by side: Anderson acceleration as in
// nodeshape/_stage.py.
//
// Written in `each` and `total`, the loops over one sample's numbers that the including file brings (cpu/simd.h), and
// knowing nothing of what F is. Samples share calls of F and nothing else: each has its own history, stops at its own
// tolerance and fails alone, so what becomes of one does not depend on its company.
#pragma once

#include "problem.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Samples that are evaluated together, so that weights are fetched once for all of them.
inline constexpr int kMaxGroup = 16;

/// Columns of iteration history Anderson acceleration keeps.
inline constexpr int kAndersonMemory = 5;

/// Arguments of one call of a function of a few samples: out[i] = F(in[i]). `slot` numbers the sample within its group.
template <class T>
struct Batch {
  int count = 0;
  int slot[kMaxGroup];
  const T* in[kMaxGroup];
  T* out[kMaxGroup];

  void add(int s, const T* from, T* to) {
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

  /// `size` numbers a sample, a multiple of the vector; `explicit_only` if every c will be 0.
  template <class Arena>
  StageSolver(Arena& arena, int64_t size, int group, StageOptions options, bool explicit_only)
      : size_(size), options_(options) {
    for (int s = 0; s < group; ++s) {
      Sample& sample = samples_[s];
      sample.stage.slope = arena.template take<T>(size);
      if (explicit_only) continue;
      sample.value = arena.template take<T>(size);
      sample.residual = arena.template take<T>(size);
      for (int m = 0; m <= kAndersonMemory; ++m) {
        sample.q[m] = arena.template take<T>(size);
        sample.x[m] = arena.template take<T>(size);
      }
    }
  }

  const Stage& operator[](int s) const { return samples_[s].stage; }

  /// Forget the last slope: the next stage is guessed to be its base.
  void restart() { started_ = false; }

  /// Solve for samples 0 ... count - 1. The last call of `function` for a sample is at the Y it ends with.
  template <class Function>
  void solve(int count, T* const* base, double c, Function&& function) {
    Batch<T> batch;
    if (c == 0.0) {
      for (int s = 0; s < count; ++s) {
        Stage& stage = samples_[s].stage;
        stage = {base[s], stage.slope, 1, 0.0, true};
        batch.add(s, stage.value, stage.slope);
      }
      function(batch);
    } else {
      for (int s = 0; s < count; ++s) {
        begin(samples_[s], base[s], T(c));
        batch.add(s, samples_[s].value, samples_[s].stage.slope);
      }
      while (batch.count > 0) {
        function(batch);
        const Batch<T> evaluated = batch;
        batch.count = 0;
        for (int i = 0; i < evaluated.count; ++i) {
          Sample& sample = samples_[evaluated.slot[i]];
          if (finished(sample, T(c))) continue;
          learn(sample);
          propose(sample);
          batch.add(evaluated.slot[i], sample.value, sample.stage.slope);
        }
      }
    }
    started_ = true;
  }

 private:
  struct Sample {
    Stage stage{};
    const T* base;
    T* value;
    T* residual;
    T* q[kAndersonMemory + 1];  // orthonormal differences of residuals; the last one in use is being made
    T* x[kAndersonMemory + 1];  // the steps of Y that made them
    int history;                // columns in use, without the one being made
    bool proposed;              // whether a column is being made
    double base_norm;
  };

  static constexpr double kRounding = sizeof(T) == 4 ? 1e-5 : 1e-13;

  double norm(const T* x) const {
    return std::sqrt(double(total<T>(size_, [=](int64_t i) { return load(x + i) * load(x + i); })));
  }

  void begin(Sample& sample, const T* base, T c) {
    T *value = sample.value, *slope = sample.stage.slope;
    const Vec<T> factor = splat(c);
    if (started_)
      each<T>(size_, [=](int64_t i) { store(value + i, fma(factor, load(slope + i), load(base + i))); });
    else
      each<T>(size_, [=](int64_t i) { store(value + i, load(base + i)); });
    sample.stage = {value, slope, 0, 0.0, false};
    sample.base = base;
    sample.base_norm = norm(base);
    sample.history = 0;
    sample.proposed = false;
  }

  /// Take in a new F(Y): the residual, and whether the iteration ends here.
  bool finished(Sample& sample, T c) {
    const T *base = sample.base, *value = sample.value, *slope = sample.stage.slope;
    T *residual = sample.residual, *q = sample.q[sample.history];
    const Vec<T> factor = splat(c);
    const auto renew = [=](int64_t i) {
      const Vec<T> r = fma(factor, load(slope + i), load(base + i)) - load(value + i);
      store(residual + i, r);
      return r;
    };
    T square;
    if (sample.proposed)
      square = total<T>(size_, [=](int64_t i) {
        const Vec<T> before = load(residual + i), r = renew(i);
        store(q + i, r - before);
        return r * r;
      });
    else
      square = total<T>(size_, [=](int64_t i) {
        const Vec<T> r = renew(i);
        return r * r;
      });

    Stage& stage = sample.stage;
    ++stage.evaluations;
    const double length = std::sqrt(double(square));
    const double value_norm = norm(value);
    const double scale = sample.base_norm >= value_norm ? sample.base_norm : value_norm;
    stage.residual = length > 0 ? length / scale : length;
    const bool broken = !__builtin_isfinite(sample.base_norm);
    stage.solved = stage.residual <= options_.tolerance || broken;
    return stage.solved || !__builtin_isfinite(stage.residual) || stage.evaluations >= options_.max_iterations;
  }

  /// Make the latest differences (q, x) orthonormal to the older ones (modified Gram-Schmidt) and keep them.
  void learn(Sample& sample) {
    if (!sample.proposed) return;
    T *q = sample.q[sample.history], *x = sample.x[sample.history];
    const double whole = norm(q);
    for (int m = 0; m < sample.history; ++m) {
      const T *old_q = sample.q[m], *old_x = sample.x[m];
      const Vec<T> overlap = splat(total<T>(size_, [=](int64_t i) { return load(old_q + i) * load(q + i); }));
      each<T>(size_, [=](int64_t i) {
        store(q + i, load(q + i) - overlap * load(old_q + i));
        store(x + i, load(x + i) - overlap * load(old_x + i));
      });
    }
    const double length = norm(q);
    // What is left of a difference that older ones span is rounding error: it says nothing about F.
    if (!(length > kRounding * whole) || !__builtin_isfinite(length)) return;
    const Vec<T> inverse = splat(T(1.0 / length));
    each<T>(size_, [=](int64_t i) {
      store(q + i, load(q + i) * inverse);
      store(x + i, load(x + i) * inverse);
    });
    if (sample.history < kAndersonMemory) {
      ++sample.history;
      return;
    }
    T *oldest_q = sample.q[0], *oldest_x = sample.x[0];
    for (int m = 0; m < kAndersonMemory; ++m) {
      sample.q[m] = sample.q[m + 1];
      sample.x[m] = sample.x[m + 1];
    }
    sample.q[kAndersonMemory] = oldest_q;
    sample.x[kAndersonMemory] = oldest_x;
  }

  /// Y += r - sum_m (q_m . r) (x_m + q_m)
  void propose(Sample& sample) {
    const T* residual = sample.residual;
    T *value = sample.value, *step = sample.x[sample.history];
    each<T>(size_, [=](int64_t i) { store(step + i, load(residual + i)); });
    for (int m = 0; m < sample.history; ++m) {
      const T *q = sample.q[m], *x = sample.x[m];
      const Vec<T> along = splat(total<T>(size_, [=](int64_t i) { return load(q + i) * load(residual + i); }));
      each<T>(size_, [=](int64_t i) { store(step + i, load(step + i) - along * (load(x + i) + load(q + i))); });
    }
    each<T>(size_, [=](int64_t i) { store(value + i, load(value + i) + load(step + i)); });
    sample.proposed = true;
  }

  int64_t size_;
  StageOptions options_;
  Sample samples_[kMaxGroup];
  bool started_ = false;
};

}  // namespace nodeshape::NODESHAPE_TARGET
