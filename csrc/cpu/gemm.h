// Small matrix products, register-blocked: c[m, n] (+)= sum_k a(m, k) b[k, n].
//
// Every element is summed over k in ascending order by one chain of fused multiply-adds, so its value does not depend
// on how many rows are multiplied at once.
#pragma once

#include "simd.h"

namespace nodeshape::NODESHAPE_TARGET {

/// a(m, k) = data[m row + k column]
template <class T>
struct Strided {
  const T* data;
  int64_t row, column;
};

/// Vectors of columns and rows of a block whose sums stay in registers.
template <int Vectors>
inline constexpr int kBlockRows = kRegisters == 32 ? (Vectors == 4 ? 6 : 8) : (Vectors == 2 ? 4 : 8);
inline constexpr int kBlockVectors = kRegisters == 32 ? 4 : 2;

namespace detail {

template <class T, int Rows, int Vectors, bool Accumulate>
void block(int64_t depth, Strided<T> a, const T* b, int64_t b_row, const T* start, T* c, int64_t c_row) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const Vec<T> first = Accumulate || start == nullptr ? Vec<T>{} : splat(start[r]);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Accumulate ? load(c + r * c_row + v * lanes) : first;
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> w[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) w[v] = load(b + k * b_row + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> x = splat(a.data[r * a.row + k * a.column]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(x, w[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(c + r * c_row + v * lanes, sums[r][v]);
}

/// block() for a number of rows known at run time, at most Rows.
template <class T, int Rows, int Vectors, bool Accumulate>
NODESHAPE_INLINE void some_rows(int64_t rows, int64_t depth, Strided<T> a, const T* b, int64_t b_row, const T* start,
                                T* c, int64_t c_row) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      block<T, Rows, Vectors, Accumulate>(depth, a, b, b_row, start, c, c_row);
    else
      some_rows<T, Rows - 1, Vectors, Accumulate>(rows, depth, a, b, b_row, start, c, c_row);
  }
}

/// All rows of one panel of columns, in blocks as even as can be: a block of few rows keeps the multipliers waiting.
template <class T, int Vectors, bool Accumulate>
void panel(int64_t rows, int64_t depth, Strided<T> a, const T* b, int64_t b_row, const T* start, T* c, int64_t c_row) {
  constexpr int64_t most = kBlockRows<Vectors>;
  for (int64_t blocks = (rows + most - 1) / most; blocks > 0; --blocks) {
    const int64_t some = (rows + blocks - 1) / blocks;
    some_rows<T, most, Vectors, Accumulate>(some, depth, a, b, b_row, start, c, c_row);
    a.data += some * a.row;
    if (start != nullptr) start += some;
    c += some * c_row;
    rows -= some;
  }
}

template <class T, int Vectors, bool Accumulate>
void panels(int64_t from, int64_t rows, int64_t columns, int64_t depth, Strided<T> a, const T* b, int64_t b_row,
            const T* start, T* c, int64_t c_row) {
  constexpr int64_t width = Vectors * kLanes<T>;
  for (; from + width <= columns; from += width)
    panel<T, Vectors, Accumulate>(rows, depth, a, b + from, b_row, start, c + from, c_row);
  if constexpr (Vectors > 1)
    if (from < columns) panels<T, Vectors / 2, Accumulate>(from, rows, columns, depth, a, b, b_row, start, c, c_row);
}

}  // namespace detail

/// `columns` is a multiple of the vector; row m of what does not accumulate begins with start[m], or with zero.
template <class T, bool Accumulate>
void gemm(int64_t rows, int64_t columns, int64_t depth, Strided<T> a, const T* b, int64_t b_row, T* c, int64_t c_row,
          const T* start = nullptr) {
  detail::panels<T, kBlockVectors, Accumulate>(0, rows, columns, depth, a, b, b_row, start, c, c_row);
}

}  // namespace nodeshape::NODESHAPE_TARGET
