// What activations are made of, a vector at a time; the including file brings the vectors
// (cpu/simd.h, cuda/block.cuh).
#pragma once

#include "loops.h"

namespace nodeshape::NODESHAPE_TARGET {

/// e^x to about one unit in the last place (Cephes' expf), for x clamped to where float neither overflows nor
/// underflows to a denormal.
NODESHAPE_INLINE Vec<float> exp(Vec<float> x) {
  x = min(max(x, splat(-87.0f)), splat(88.0f));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 2^23: adding it rounds to an integer
  const Vec<float> n = fma(x, splat(1.44269504f), magic) - magic;
  Vec<float> r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec<float> p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r) + splat(1.0f);
  return p * power_of_two(n);
}

/// x P(x^2) / Q(x^2) for |x| <= 7.9, minimax in the relative error (6e-9; in float at most 6 units in the last place),
/// and constant beyond, where tanh is 1 to 3e-7; never more than 1.
NODESHAPE_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = min(splat(7.9f), max(splat(-7.9f), x)), s = a * a;
  Vec<float> p = splat(1.542787764208242e-08f), q = splat(8.598743193033442e-07f);
  p = fma(p, s, splat(2.2023183191777207e-05f));
  q = fma(q, s, splat(3.4236445208080113e-04f));
  p = fma(p, s, splat(3.5789883695542812e-03f));
  q = fma(q, s, splat(2.6192225515842438e-02f));
  p = fma(p, s, splat(1.3450618088245392e-01f));
  q = fma(q, s, splat(4.6783944964408875e-01f));
  p = fma(p, s, splat(1.0f));
  q = fma(q, s, splat(1.0f));
  return quotient(a * p, q);
}

NODESHAPE_INLINE Vec<float> sigmoid(Vec<float> x) {
  const Vec<float> y = quotient(splat(1.0f), splat(1.0f) + exp(-x));
  return x != x ? x : y;
}

/// log(1 + e^x) = max(x, 0) + log1p(e^-|x|); log1p(u) = 2 atanh(u / (2 + u)), whose series is short as u <= 1.
NODESHAPE_INLINE Vec<float> softplus(Vec<float> x) {
  const Vec<float> zero{}, u = exp(x < zero ? x : -x);
  const Vec<float> s = u / (splat(2.0f) + u), square = s * s;
  Vec<float> p = splat(2.0f / 15);
  p = fma(p, square, splat(2.0f / 13));
  p = fma(p, square, splat(2.0f / 11));
  p = fma(p, square, splat(2.0f / 9));
  p = fma(p, square, splat(2.0f / 7));
  p = fma(p, square, splat(2.0f / 5));
  p = fma(p, square, splat(2.0f / 3));
  p = fma(p, square, splat(2.0f));
  const Vec<float> y = fma(p, s, x > zero ? x : zero);
  return x != x || x > splat(20.0f) ? x : y;  // torch's threshold
}

NODESHAPE_INLINE Vec<double> tanh(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return ::tanh(a); });
}
NODESHAPE_INLINE Vec<double> sigmoid(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return 1.0 / (1.0 + ::exp(-a)); });
}
NODESHAPE_INLINE Vec<double> softplus(Vec<double> x) {
  return lane_by_lane(x, [](double a) { return a > 20 ? a : (a > 0 ? a : 0 * a) + ::log1p(::exp(-::fabs(a))); });
}

}  // namespace nodeshape::NODESHAPE_TARGET
