// Functions of one or two elements and their derivatives, a vector at a time; the including file brings the vectors
// (cpu/simd.h, cuda/block.cuh).
#pragma once

#include <type_traits>

#include "activation.h"
#include "program.h"

namespace nodeshape::NODESHAPE_TARGET {

/// function of each lane, in the precision of the vector.
template <class V, class Function>
NODESHAPE_INLINE V lanewise(V x, Function&& function) {
  if constexpr (std::is_arithmetic_v<V>) {
    return function(x);
  } else {
    for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = function(x[i]);
    return x;
  }
}
template <class V>
NODESHAPE_INLINE auto first_lane(V x) {
  if constexpr (std::is_arithmetic_v<V>)
    return x;
  else
    return x[0];
}

NODESHAPE_INLINE Vec<double> exp(Vec<double> x) {
  return lanewise(x, [](double a) { return ::exp(a); });
}
NODESHAPE_INLINE float log_of(float x) { return ::logf(x); }
NODESHAPE_INLINE double log_of(double x) { return ::log(x); }
NODESHAPE_INLINE float sin_of(float x) { return ::sinf(x); }
NODESHAPE_INLINE double sin_of(double x) { return ::sin(x); }
NODESHAPE_INLINE float cos_of(float x) { return ::cosf(x); }
NODESHAPE_INLINE double cos_of(double x) { return ::cos(x); }
NODESHAPE_INLINE float root_of(float x) { return ::sqrtf(x); }
NODESHAPE_INLINE double root_of(double x) { return ::sqrt(x); }
NODESHAPE_INLINE float erf_of(float x) { return ::erff(x); }
NODESHAPE_INLINE double erf_of(double x) { return ::erf(x); }
NODESHAPE_INLINE float power_of(float x, float y) { return ::powf(x, y); }
NODESHAPE_INLINE double power_of(double x, double y) { return ::pow(x, y); }
NODESHAPE_INLINE float atan_of(float x) { return ::atanf(x); }
NODESHAPE_INLINE double atan_of(double x) { return ::atan(x); }
NODESHAPE_INLINE float asinh_of(float x) { return ::asinhf(x); }
NODESHAPE_INLINE double asinh_of(double x) { return ::asinh(x); }
NODESHAPE_INLINE float log1p_of(float x) { return ::log1pf(x); }
NODESHAPE_INLINE double log1p_of(double x) { return ::log1p(x); }
NODESHAPE_INLINE float expm1_of(float x) { return ::expm1f(x); }
NODESHAPE_INLINE double expm1_of(double x) { return ::expm1(x); }

template <class V>
NODESHAPE_INLINE V log_of_lanes(V x) {
  return lanewise(x, [](auto a) { return log_of(a); });
}
template <class V>
NODESHAPE_INLINE V root_of_lanes(V x) {
  return lanewise(x, [](auto a) { return root_of(a); });
}
template <class V>
NODESHAPE_INLINE V erf_of_lanes(V x) {
  return lanewise(x, [](auto a) { return erf_of(a); });
}

/// e^x - 1, for x <= 0.
NODESHAPE_INLINE Vec<double> expm1_of_lanes(Vec<double> x) {
  return lanewise(x, [](double a) { return ::expm1(a); });
}
/// As exp(), but 2^n (1 + p) - 1.
NODESHAPE_INLINE Vec<float> expm1_of_lanes(Vec<float> x) {
  const Vec<float> bound = min(max(x, splat(-87.0f)), splat(88.0f));
  const Vec<float> magic = splat(12582912.0f);
  const Vec<float> n = fma(bound, splat(1.44269504f), magic) - magic;
  Vec<float> r = fma(n, splat(-0.693359375f), bound);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r);
  const Vec<float> power = power_of_two(n), y = fma(power, p, power - splat(1.0f));
  return x != x ? x : y;
}

template <class V>
NODESHAPE_INLINE V tanh_of_softplus(V x) {
  return tanh(softplus(x));
}

/// The vector's constants of a function.
template <class T>
struct Constants {
  Vec<T> c0, c1, c2;
};

inline constexpr double kRootHalf = 0.70710678118654752440, kRootTwoOverPi = 0.79788456080286535588,
                        kInverseRootTwoPi = 0.39894228040143267794, kGeluCubic = 0.044715,
                        kTwoOverRootPi = 1.12837916709551257390;

/// f(x)
template <Unary F, class T>
NODESHAPE_INLINE Vec<T> apply(Vec<T> x, const Constants<T>& k) {
  const Vec<T> zero{}, one = splat(T(1));
  if constexpr (F == Unary::affine) return fma(k.c0, x, k.c1);
  if constexpr (F == Unary::tanh) return tanh(x);
  if constexpr (F == Unary::sigmoid) return sigmoid(x);
  if constexpr (F == Unary::relu) return zero > x ? zero : x;  // keeps NaN
  if constexpr (F == Unary::leaky_relu) return x > zero ? x : k.c0 * x;
  if constexpr (F == Unary::elu) return x > zero ? k.c1 * x : k.c0 * expm1_of_lanes(Vec<T>(k.c2 * x));
  if constexpr (F == Unary::gelu) return splat(T(0.5)) * x * (one + erf_of_lanes(Vec<T>(splat(T(kRootHalf)) * x)));
  if constexpr (F == Unary::gelu_tanh)
    return splat(T(0.5)) * x * (one + tanh(Vec<T>(splat(T(kRootTwoOverPi)) * fma(splat(T(kGeluCubic)), x * x * x, x))));
  if constexpr (F == Unary::silu) return x * sigmoid(x);
  if constexpr (F == Unary::softplus) {
    const Vec<T> scaled = k.c0 * x;
    return scaled > k.c1 ? x : softplus(scaled) / k.c0;
  }
  if constexpr (F == Unary::mish) return x * tanh_of_softplus(x);
  if constexpr (F == Unary::sin) return lanewise(x, [](T a) { return sin_of(a); });
  if constexpr (F == Unary::cos) return lanewise(x, [](T a) { return cos_of(a); });
  if constexpr (F == Unary::exp) {
    if constexpr (sizeof(T) == 8) return exp(x);
    return x != x ? x : x > splat(T(88)) ? lanewise(x, [](T a) { return T(::exp(double(a))); }) : exp(x);
  }
  if constexpr (F == Unary::log) return log_of_lanes(x);
  if constexpr (F == Unary::sqrt) return root_of_lanes(x);
  if constexpr (F == Unary::abs) return x > zero ? x : -x;
  if constexpr (F == Unary::power) return lanewise(x, [y = first_lane(k.c0)](T a) { return power_of(a, y); });
  if constexpr (F == Unary::reciprocal) return one / x;
  if constexpr (F == Unary::clamp) {
    const Vec<T> above = x < k.c0 ? k.c0 : x;
    return above > k.c1 ? k.c1 : above;
  }
  if constexpr (F == Unary::erf) return erf_of_lanes(x);
  if constexpr (F == Unary::square) return x * x;
  if constexpr (F == Unary::cube) return x * x * x;
  if constexpr (F == Unary::atan) return lanewise(x, [](T a) { return atan_of(a); });
  if constexpr (F == Unary::asinh) return lanewise(x, [](T a) { return asinh_of(a); });
  if constexpr (F == Unary::log1p) return lanewise(x, [](T a) { return log1p_of(a); });
  if constexpr (F == Unary::expm1) return lanewise(x, [](T a) { return expm1_of(a); });
}

/// f'(x), given y = f(x) too
template <Unary F, class T>
NODESHAPE_INLINE Vec<T> slope(Vec<T> x, Vec<T> y, const Constants<T>& k) {
  const Vec<T> zero{}, one = splat(T(1));
  if constexpr (F == Unary::affine) return k.c0;
  if constexpr (F == Unary::tanh) return one - y * y;
  if constexpr (F == Unary::sigmoid) return y * (one - y);
  if constexpr (F == Unary::relu) return x > zero ? one : zero;
  if constexpr (F == Unary::leaky_relu) return x > zero ? one : k.c0;
  if constexpr (F == Unary::elu) return x > zero ? k.c1 : k.c2 * (y + k.c0);
  if constexpr (F == Unary::gelu) {
    const Vec<T> density = splat(T(kInverseRootTwoPi)) * exp(Vec<T>(splat(T(-0.5)) * x * x));
    return fma(x, density, splat(T(0.5)) * (one + erf_of_lanes(Vec<T>(splat(T(kRootHalf)) * x))));
  }
  if constexpr (F == Unary::gelu_tanh) {
    const Vec<T> square = x * x, inner = splat(T(kRootTwoOverPi)) * fma(splat(T(kGeluCubic)), square * x, x);
    const Vec<T> t = tanh(inner), half = splat(T(0.5));
    const Vec<T> to_inner = splat(T(kRootTwoOverPi)) * fma(splat(T(3 * kGeluCubic)), square, one);
    return half * (one + t) + half * x * (one - t * t) * to_inner;
  }
  if constexpr (F == Unary::silu) {
    const Vec<T> s = sigmoid(x);
    return s * fma(x, one - s, one);
  }
  if constexpr (F == Unary::softplus) {
    const Vec<T> scaled = k.c0 * x;
    return scaled > k.c1 ? one : sigmoid(scaled);
  }
  if constexpr (F == Unary::mish) {
    const Vec<T> t = tanh_of_softplus(x);
    return fma(x * (one - t * t), sigmoid(x), t);
  }
  if constexpr (F == Unary::sin) return lanewise(x, [](T a) { return cos_of(a); });
  if constexpr (F == Unary::cos) return lanewise(x, [](T a) { return -sin_of(a); });
  if constexpr (F == Unary::exp) return y;
  if constexpr (F == Unary::log) return one / x;
  if constexpr (F == Unary::sqrt) return splat(T(0.5)) / y;
  if constexpr (F == Unary::abs) return x > zero ? one : (x < zero ? -one : zero);
  if constexpr (F == Unary::power)
    return lanewise(x, [p = first_lane(k.c0)](T a) { return p == 0 ? T(0) : p * power_of(a, p - 1); });
  if constexpr (F == Unary::reciprocal) return -y * y;
  if constexpr (F == Unary::clamp) return x < k.c0 ? zero : (x > k.c1 ? zero : one);
  if constexpr (F == Unary::erf) return splat(T(kTwoOverRootPi)) * exp(Vec<T>(-x * x));
  if constexpr (F == Unary::square) return x + x;
  if constexpr (F == Unary::cube) return splat(T(3)) * x * x;
  if constexpr (F == Unary::atan) return one / fma(x, x, one);
  if constexpr (F == Unary::asinh) return one / root_of_lanes(Vec<T>(fma(x, x, one)));
  if constexpr (F == Unary::log1p) return one / (one + x);
  if constexpr (F == Unary::expm1) return y + one;
}

/// Calls body.operator()<F>() for the function.
template <class Body>
NODESHAPE_INLINE void with_unary(Unary function, Body&& body) {
#define NODESHAPE_CASE(name) \
  case Unary::name:          \
    return body.template operator()<Unary::name>();
  switch (function) {
    NODESHAPE_CASE(affine)
    NODESHAPE_CASE(tanh)
    NODESHAPE_CASE(sigmoid)
    NODESHAPE_CASE(relu)
    NODESHAPE_CASE(leaky_relu)
    NODESHAPE_CASE(elu)
    NODESHAPE_CASE(gelu)
    NODESHAPE_CASE(gelu_tanh)
    NODESHAPE_CASE(silu)
    NODESHAPE_CASE(softplus)
    NODESHAPE_CASE(mish)
    NODESHAPE_CASE(sin)
    NODESHAPE_CASE(cos)
    NODESHAPE_CASE(exp)
    NODESHAPE_CASE(log)
    NODESHAPE_CASE(sqrt)
    NODESHAPE_CASE(abs)
    NODESHAPE_CASE(power)
    NODESHAPE_CASE(reciprocal)
    NODESHAPE_CASE(clamp)
    NODESHAPE_CASE(erf)
    NODESHAPE_CASE(square)
    NODESHAPE_CASE(cube)
    NODESHAPE_CASE(atan)
    NODESHAPE_CASE(asinh)
    NODESHAPE_CASE(log1p)
    NODESHAPE_CASE(expm1)
  }
#undef NODESHAPE_CASE
}

template <Binary F, class V>
NODESHAPE_INLINE V combine(V a, V b) {
  if constexpr (F == Binary::add) return a + b;
  if constexpr (F == Binary::subtract) return a - b;
  if constexpr (F == Binary::multiply) return a * b;
  if constexpr (F == Binary::divide) return a / b;
  if constexpr (F == Binary::maximum) return a != a ? a : (a > b ? a : b);
  if constexpr (F == Binary::minimum) return a != a ? a : (a < b ? a : b);
  if constexpr (F == Binary::greater) return a > b ? V{} + 1 : V{};
  if constexpr (F == Binary::greater_equal) return a >= b ? V{} + 1 : V{};
  if constexpr (F == Binary::keep) return b != V{} ? a : V{};
}

/// w times the derivative by a, of which torch gives both arguments half where they are equal.
template <Binary F, class V>
NODESHAPE_INLINE V to_first(V w, V a, V b) {
  if constexpr (F == Binary::add || F == Binary::subtract) return w;
  if constexpr (F == Binary::multiply) return w * b;
  if constexpr (F == Binary::divide) return w / b;
  if constexpr (F == Binary::maximum) return a > b ? w : (a < b ? V{} : w * (V{} + 1) / (V{} + 2));
  if constexpr (F == Binary::minimum) return a < b ? w : (a > b ? V{} : w * (V{} + 1) / (V{} + 2));
  if constexpr (F == Binary::greater || F == Binary::greater_equal) return V{};
  if constexpr (F == Binary::keep) return b != V{} ? w : V{};
}

/// w times the derivative by b
template <Binary F, class V>
NODESHAPE_INLINE V to_second(V w, V a, V b) {
  if constexpr (F == Binary::add) return w;
  if constexpr (F == Binary::subtract) return -w;
  if constexpr (F == Binary::multiply) return w * a;
  if constexpr (F == Binary::divide) return -w * a / (b * b);
  if constexpr (F == Binary::maximum || F == Binary::minimum) return to_first<F>(w, b, a);
  if constexpr (F == Binary::greater || F == Binary::greater_equal || F == Binary::keep) return V{};
}

/// Calls body.operator()<F>() for the function.
template <class Body>
NODESHAPE_INLINE void with_binary(Binary function, Body&& body) {
  switch (function) {
    case Binary::add:
      return body.template operator()<Binary::add>();
    case Binary::subtract:
      return body.template operator()<Binary::subtract>();
    case Binary::multiply:
      return body.template operator()<Binary::multiply>();
    case Binary::divide:
      return body.template operator()<Binary::divide>();
    case Binary::maximum:
      return body.template operator()<Binary::maximum>();
    case Binary::minimum:
      return body.template operator()<Binary::minimum>();
    case Binary::greater:
      return body.template operator()<Binary::greater>();
    case Binary::greater_equal:
      return body.template operator()<Binary::greater_equal>();
    case Binary::keep:
      return body.template operator()<Binary::keep>();
  }
}

}  // namespace nodeshape::NODESHAPE_TARGET
