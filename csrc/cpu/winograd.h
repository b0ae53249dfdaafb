// Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016): a 3x3 convolution as 36 products instead of 144 a tile.
//
//     output tile [4, 4] = A^T ((G g G^T) * (B^T d B)) A,   filter g [3, 3], input tile d [6, 6]
//
// interpolated at 0, +-p, +-q and infinity. With p = 3/4, q = 3/2 instead of the usual 1, 2 the rounding error is half
// as large (measured on 64 channels: 6.6e-7 against 1.3e-6). All transforms are one-dimensional ones over columns and
// then rows, of vectors that hold channels.
#pragma once

#include "simd.h"

namespace nodeshape::NODESHAPE_TARGET::winograd {

inline constexpr int kTile = 4;       // outputs a side
inline constexpr int kPatch = 6;      // inputs a side
inline constexpr int kProducts = 36;  // a tile
inline constexpr double kP = 0.75, kQ = 1.5;
inline constexpr double kP2 = kP * kP, kQ2 = kQ * kQ;

/// B^T d
template <class T>
NODESHAPE_INLINE void input(const Vec<T> (&d)[6], Vec<T> (&v)[6]) {
  const Vec<T> p2 = splat(T(kP2)), q2 = splat(T(kQ2)), p = splat(T(kP)), q = splat(T(kQ));
  const Vec<T> both = splat(T(kP2 * kQ2)), either = splat(T(-kP2 - kQ2));
  const Vec<T> even_p = fma(-q2, d[2], d[4]), odd_p = p * fma(-q2, d[1], d[3]);
  const Vec<T> even_q = fma(-p2, d[2], d[4]), odd_q = q * fma(-p2, d[1], d[3]);
  v[0] = fma(both, d[0], fma(either, d[2], d[4]));
  v[1] = even_p + odd_p;
  v[2] = even_p - odd_p;
  v[3] = even_q + odd_q;
  v[4] = even_q - odd_q;
  v[5] = fma(both, d[1], fma(either, d[3], d[5]));
}

/// A^T m
template <class T>
NODESHAPE_INLINE void output(const Vec<T> (&m)[6], Vec<T> (&y)[4]) {
  const Vec<T> sum_p = m[1] + m[2], difference_p = m[1] - m[2];
  const Vec<T> sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  y[0] = m[0] + (sum_p + sum_q);
  y[1] = fma(splat(T(kQ)), difference_q, splat(T(kP)) * difference_p);
  y[2] = fma(splat(T(kQ2)), sum_q, splat(T(kP2)) * sum_p);
  y[3] = fma(splat(T(kQ2 * kQ)), difference_q, fma(splat(T(kP2 * kP)), difference_p, m[5]));
}

/// A z, the transpose of output()
template <class T>
NODESHAPE_INLINE void output_transposed(const Vec<T> (&z)[4], Vec<T> (&m)[6]) {
  const Vec<T> even_p = fma(splat(T(kP2)), z[2], z[0]), even_q = fma(splat(T(kQ2)), z[2], z[0]);
  const Vec<T> odd_p = fma(splat(T(kP2 * kP)), z[3], splat(T(kP)) * z[1]);
  const Vec<T> odd_q = fma(splat(T(kQ2 * kQ)), z[3], splat(T(kQ)) * z[1]);
  m[0] = z[0];
  m[1] = even_p + odd_p;
  m[2] = even_p - odd_p;
  m[3] = even_q + odd_q;
  m[4] = even_q - odd_q;
  m[5] = z[3];
}

inline constexpr double kWeight0 = 1 / (kP2 * kQ2);
inline constexpr double kWeightP = 1 / (2 * kP2 * (kP2 - kQ2));
inline constexpr double kWeightQ = 1 / (2 * kQ2 * (kQ2 - kP2));

/// G g
template <class T>
NODESHAPE_INLINE void filter(const Vec<T> (&g)[3], Vec<T> (&u)[6]) {
  const Vec<T> even_p = fma(splat(T(kP2)), g[2], g[0]), odd_p = splat(T(kP)) * g[1];
  const Vec<T> even_q = fma(splat(T(kQ2)), g[2], g[0]), odd_q = splat(T(kQ)) * g[1];
  u[0] = splat(T(kWeight0)) * g[0];
  u[1] = splat(T(kWeightP)) * (even_p + odd_p);
  u[2] = splat(T(kWeightP)) * (even_p - odd_p);
  u[3] = splat(T(kWeightQ)) * (even_q + odd_q);
  u[4] = splat(T(kWeightQ)) * (even_q - odd_q);
  u[5] = g[2];
}

/// G^T u
template <class T>
NODESHAPE_INLINE void filter_transposed(const Vec<T> (&u)[6], Vec<T> (&g)[3]) {
  const Vec<T> sum_p = splat(T(kWeightP)) * (u[1] + u[2]), sum_q = splat(T(kWeightQ)) * (u[3] + u[4]);
  const Vec<T> difference_p = splat(T(kWeightP)) * (u[1] - u[2]), difference_q = splat(T(kWeightQ)) * (u[3] - u[4]);
  g[0] = fma(splat(T(kWeight0)), u[0], sum_p + sum_q);
  g[1] = fma(splat(T(kP)), difference_p, splat(T(kQ)) * difference_q);
  g[2] = fma(splat(T(kP2)), sum_p, fma(splat(T(kQ2)), sum_q, u[5]));
}

/// The one-dimensional transform `step` over the columns and then the rows of a square of vectors.
template <class T, int From, int To, class Step>
NODESHAPE_INLINE void both_ways(const Vec<T> (&in)[From][From], Vec<T> (&out)[To][To], Step&& step) {
  Vec<T> half[To][From];
#pragma GCC unroll 6
  for (int j = 0; j < From; ++j) {
    Vec<T> column[From], transformed[To];
#pragma GCC unroll 6
    for (int i = 0; i < From; ++i) column[i] = in[i][j];
    step(column, transformed);
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) half[i][j] = transformed[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) step(half[i], out[i]);
}

}  // namespace nodeshape::NODESHAPE_TARGET::winograd
