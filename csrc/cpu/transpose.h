// Matrices turned around, in squares of as many rows and columns as a vector has lanes.
#pragma once

#include "simd.h"

namespace nodeshape::NODESHAPE_TARGET {

namespace detail {

template <class T>
struct IntegersOf;
template <>
struct IntegersOf<float> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct IntegersOf<double> {
  typedef int64_t type __attribute__((vector_size(kVectorBytes)));
};

#if defined(__clang__)
template <class T>
NODESHAPE_INLINE Vec<T> pick(Vec<T> a, Vec<T> b, typename IntegersOf<T>::type from) {
  Vec<T> out;
  for (int64_t i = 0; i < kLanes<T>; ++i) out[i] = from[i] < kLanes<T> ? a[from[i]] : b[from[i] - kLanes<T>];
  return out;
}
#else
template <class T>
NODESHAPE_INLINE Vec<T> pick(Vec<T> a, Vec<T> b, typename IntegersOf<T>::type from) {
  return __builtin_shuffle(a, b, from);
}
#endif

/// Swaps the off-diagonal blocks of `Half` lanes of each pair of rows, then of half as many.
template <class T, int Half>
NODESHAPE_INLINE void exchange(Vec<T>* rows) {
  if constexpr (Half > 0) {
    typename IntegersOf<T>::type low{}, high{};
    for (int i = 0; i < kLanes<T>; ++i) {
      const bool upper = (i / Half) % 2 != 0;
      low[i] = upper ? int(kLanes<T>) + i - Half : i;
      high[i] = upper ? int(kLanes<T>) + i : i + Half;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes<T>; ++r) {
      if ((r / Half) % 2 != 0) continue;
      const Vec<T> a = rows[r], b = rows[r + Half];
      rows[r] = pick<T>(a, b, low);
      rows[r + Half] = pick<T>(a, b, high);
    }
    exchange<T, Half / 2>(rows);
  }
}

}  // namespace detail

/// to[c, r] = from[r, c] for r < rows and c < columns; what is left of whole squares goes one by one.
template <class T>
NODESHAPE_OUTLINE void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to,
                                 int64_t to_row) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t whole_rows = rows / lanes * lanes, whole_columns = columns / lanes * lanes;
  for (int64_t r = 0; r < whole_rows; r += lanes)
    for (int64_t c = 0; c < whole_columns; c += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) square[i] = load(from + (r + i) * from_row + c);
      detail::exchange<T, int(lanes) / 2>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) store(to + (c + i) * to_row + r, square[i]);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
}

}  // namespace nodeshape::NODESHAPE_TARGET
