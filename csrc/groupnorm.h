// GroupNorm of one feature map [pixels, padded channels], and its derivative.
//
// Written in `each`, `spread` and `sum_rows`, which the including file brings (cpu/simd.h, cuda/block.cuh).
//
//     xhat = (x - mean) rstd over a group's channels and all pixels,   y = gamma xhat + beta = scale x + shift
#pragma once

#include "loops.h"
#include "problem.h"

namespace nodeshape::NODESHAPE_TARGET {

inline constexpr double kNormEpsilon = 1e-5;

template <class T>
class GroupNorm {
 public:
  /// gamma and beta are [padded channels], zero beyond the channels.
  template <class Arena>
  NODESHAPE_FUNCTION GroupNorm(int64_t pixels, int64_t channels, int64_t groups, const T* gamma, const T* beta,
                               Arena& arena)
      : pixels_(pixels),
        width_(padded<T>(channels)),
        groups_(groups),
        members_(channels / groups),
        gamma_(gamma),
        beta_(beta) {
    T* rows = arena.template zeros<T>(8 * width_);
    mean_ = rows;
    rstd_ = rows + width_;
    scale_ = rows + 2 * width_;
    shift_ = rows + 3 * width_;
    to_gamma_ = rows + 4 * width_;
    to_beta_ = rows + 5 * width_;
    from_x_ = rows + 6 * width_;
    constant_ = rows + 7 * width_;
  }

  /// Take the statistics of x.
  NODESHAPE_FUNCTION void prepare(const T* x) { prepare(x, 0, width_); }
  /// Take those of `channels` channels from `first` on: whole vectors and whole groups.
  NODESHAPE_FUNCTION void prepare(const T* x, int64_t first, int64_t channels) {
    const T count = T(pixels_ * members_);
    T *mean = mean_ + first, *rstd = rstd_ + first;
    sum_rows<T>(pixels_, channels, mean, [=, this](int64_t p, int64_t c) { return load(x + p * width_ + first + c); });
    share(mean_, first, channels, [=](T sum) { return sum / count; });
    sum_rows<T>(pixels_, channels, rstd, [=, this](int64_t p, int64_t c) {
      const Vec<T> d = load(x + p * width_ + first + c) - load(mean + c);
      return d * d;
    });
    share(rstd_, first, channels, [=](T sum) { return T(1) / std::sqrt(sum / count + T(kNormEpsilon)); });
    each<T>(channels, [=, this](int64_t i) {
      const int64_t c = first + i;
      const Vec<T> scale = load(gamma_ + c) * load(rstd_ + c);
      store(scale_ + c, scale);
      store(shift_ + c, fma(-load(mean_ + c), scale, load(beta_ + c)));
    });
  }

  /// y, given x at channel vector c.
  NODESHAPE_INLINE Vec<T> apply(Vec<T> x, int64_t c) const { return fma(x, load(scale_ + c), load(shift_ + c)); }

  /// Take in the cotangent g of y at every pixel; afterwards pull() is the cotangent of x.
  NODESHAPE_FUNCTION void prepare_pull(const T* x, const T* g) {
    sum_rows<T>(pixels_, width_, to_beta_, [=, this](int64_t p, int64_t c) { return load(g + p * width_ + c); });
    sum_rows<T>(pixels_, width_, to_gamma_, [=, this](int64_t p, int64_t c) {
      return load(g + p * width_ + c) * (load(x + p * width_ + c) - load(mean_ + c));
    });
    each<T>(width_, [=, this](int64_t c) {
      const Vec<T> gamma = load(gamma_ + c), to_gamma = load(to_gamma_ + c) * load(rstd_ + c);
      store(to_gamma_ + c, to_gamma);
      store(from_x_ + c, gamma * to_gamma);
      store(constant_ + c, gamma * load(to_beta_ + c));
    });
    const T count = T(pixels_ * members_);
    share(from_x_, 0, width_, [=](T sum) { return sum / count; });
    share(constant_, 0, width_, [=](T sum) { return sum / count; });
    // dx = rstd (gamma g - mean(gamma g) - xhat mean(gamma g xhat))
    each<T>(width_, [=, this](int64_t c) {
      const Vec<T> rstd = load(rstd_ + c);
      store(from_x_ + c, -rstd * rstd * load(from_x_ + c));
      store(constant_ + c, -rstd * load(constant_ + c));
    });
  }

  /// The cotangent of x where the map is x and the cotangent of y is g.
  NODESHAPE_INLINE Vec<T> pull(Vec<T> x, Vec<T> g, int64_t c) const {
    return fma(g, load(scale_ + c), fma(x - load(mean_ + c), load(from_x_ + c), load(constant_ + c)));
  }

  NODESHAPE_FUNCTION const T* to_gamma() const { return to_gamma_; }  // [padded channels], of the latest prepare_pull()
  NODESHAPE_FUNCTION const T* to_beta() const { return to_beta_; }

 private:
  /// Replace the number of each of some channels by function(sum over its group).
  template <class Function>
  NODESHAPE_FUNCTION void share(T* row, int64_t first, int64_t channels, Function&& function) const {
    const int64_t begin = first / members_, end = first + channels < width_ ? (first + channels) / members_ : groups_;
    spread(end - begin, [=, this](int64_t group) {
      T* members = row + (begin + group) * members_;
      T sum = members[0];
      for (int64_t m = 1; m < members_; ++m) sum += members[m];
      const T value = function(sum);
      for (int64_t m = 0; m < members_; ++m) members[m] = value;
    });
  }

  int64_t pixels_, width_, groups_, members_;
  const T *gamma_, *beta_;
  T *mean_, *rstd_, *scale_, *shift_;  // [padded channels], as all below
  T *to_gamma_, *to_beta_, *from_x_, *constant_;
};

}  // namespace nodeshape::NODESHAPE_TARGET
