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

/// A square, or its first rows or columns.
template <class T, class Rows, class Columns>
NODESHAPE_INLINE void transpose_square(Rows rows, Columns columns, const T* from, int64_t from_row, T* to,
                                       int64_t to_row) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> square[lanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i) {
    square[i] = Vec<T>{};
    if (i < lanes_of<T>(rows)) square[i] = load(from + i * from_row, columns);
  }
  exchange<T, int(lanes) / 2>(square);
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i)
    if (i < lanes_of<T>(columns)) store(to + i * to_row, square[i], rows);
}

}  // namespace detail

/// to[c, r] = from[r, c] for r < rows and c < columns.
template <class T>
NODESHAPE_OUTLINE void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to,
                                 int64_t to_row) {
  constexpr int64_t kFew = kLanes<T> / 4;  // elements of a row or column that go one by one
  each_part<T>(rows, [=](int64_t r, auto some_rows) {
    each_part<T>(columns, [=](int64_t c, auto some_columns) {
      const T* square = from + r * from_row + c;
      T* turned = to + c * to_row + r;
      const int64_t high = lanes_of<T>(some_rows), wide = lanes_of<T>(some_columns);
      if (high > kFew && wide > kFew)
        return detail::transpose_square<T>(some_rows, some_columns, square, from_row, turned, to_row);
      for (int64_t i = 0; i < high; ++i)
        for (int64_t j = 0; j < wide; ++j) turned[j * to_row + i] = square[i * from_row + j];
    });
  });
}

}  // namespace nodeshape::NODESHAPE_TARGET
