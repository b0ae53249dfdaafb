// Convolutions of maps whose pixels are rows of `width` lanes, a lane per sample: matrix products whose right factor is
// read at shifted places of a framed map.
//
// As in gemm.h every element is one chain of fused multiply-adds, whatever its neighbours.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "../program.h"

namespace nodeshape::NODESHAPE_TARGET {

namespace detail {

/// c[r, columns] (+)= start[r] + sum_k w[r w_row + at[k]] x[from[k] + columns]
template <class T, int Rows, int Vectors>
void taps(int64_t depth, const T* w, int64_t w_row, const int64_t* at, const T* x, const int64_t* from, const T* start,
          bool add, T* c, int64_t c_row) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      sums[r][v] = start == nullptr ? Vec<T>{} : splat(start[r]);
      if (add) sums[r][v] += load(c + r * c_row + v * lanes);
    }
  for (int64_t k = 0; k < depth; ++k) {
    const T *row = x + from[k], *weight = w + at[k];
    Vec<T> in[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) in[v] = load(row + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> factor = splat(weight[r * w_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[r][v] = fma(factor, in[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(c + r * c_row + v * lanes, sums[r][v]);
}

template <class T, int Rows, int Vectors>
NODESHAPE_INLINE void some_taps(int64_t rows, int64_t depth, const T* w, int64_t w_row, const int64_t* at, const T* x,
                                const int64_t* from, const T* start, bool add, T* c, int64_t c_row) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      taps<T, Rows, Vectors>(depth, w, w_row, at, x, from, start, add, c, c_row);
    else
      some_taps<T, Rows - 1, Vectors>(rows, depth, w, w_row, at, x, from, start, add, c, c_row);
  }
}

template <class T, int Vectors>
void tap_panels(int64_t column, int64_t columns, int64_t rows, int64_t depth, const T* w, int64_t w_row,
                const int64_t* at, const T* x, const int64_t* from, const T* start, bool add, T* c, int64_t c_row) {
  constexpr int64_t most = kBlockRows<Vectors>, width = Vectors * kLanes<T>;
  for (; column + width <= columns; column += width) {
    int64_t row = 0, left = rows;
    for (int64_t blocks = (rows + most - 1) / most; blocks > 0; --blocks) {
      const int64_t some = (left + blocks - 1) / blocks;
      some_taps<T, most, Vectors>(some, depth, w + row * w_row, w_row, at, x + column, from,
                                  start == nullptr ? nullptr : start + row, add, c + row * c_row + column, c_row);
      row += some;
      left -= some;
    }
  }
  if constexpr (Vectors > 1)
    if (column < columns)
      tap_panels<T, Vectors / 2>(column, columns, rows, depth, w, w_row, at, x, from, start, add, c, c_row);
}

/// sums[r sums_row + q lanes] += the sum over rows and columns of dz[r dz_map + ...] x[from[q] + ...], lane by lane.
template <class T, int Rows, int Taps>
void tap_products(int64_t height, int64_t columns, const T* dz, int64_t dz_map, int64_t dz_row, const T* x,
                  const int64_t* from, int64_t x_row, T* sums, int64_t sums_row) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> total[Rows][Taps];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Taps; ++q) total[r][q] = load(sums + r * sums_row + q * lanes);
  for (int64_t y = 0; y < height; ++y) {
    const T* rows[Taps];
#pragma GCC unroll 8
    for (int q = 0; q < Taps; ++q) rows[q] = x + from[q] + y * x_row;
    const T* cotangent = dz + y * dz_row;
    for (int64_t i = 0; i < columns; i += lanes) {
      Vec<T> d[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) d[r] = load(cotangent + r * dz_map + i);
#pragma GCC unroll 8
      for (int q = 0; q < Taps; ++q) {
        const Vec<T> in = load(rows[q] + i);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) total[r][q] = fma(d[r], in, total[r][q]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Taps; ++q) store(sums + r * sums_row + q * lanes, total[r][q]);
}

template <class T, int Rows>
void some_tap_products(int64_t taps, int64_t height, int64_t columns, const T* dz, int64_t dz_map, int64_t dz_row,
                       const T* x, const int64_t* from, int64_t x_row, T* sums, int64_t sums_row) {
  constexpr int block = kRegisters == 32 ? 6 : 3;
  int64_t q = 0;
  for (; q + block <= taps; q += block)
    tap_products<T, Rows, block>(height, columns, dz, dz_map, dz_row, x, from + q, x_row, sums + q * kLanes<T>,
                                 sums_row);
  for (; q + 3 <= taps; q += 3)
    tap_products<T, Rows, 3>(height, columns, dz, dz_map, dz_row, x, from + q, x_row, sums + q * kLanes<T>, sums_row);
  for (; q < taps; ++q)
    tap_products<T, Rows, 1>(height, columns, dz, dz_map, dz_row, x, from + q, x_row, sums + q * kLanes<T>, sums_row);
}

}  // namespace detail

/// One convolution's places: of weights and of shifted pixels, for each of `depth` products of a sum.
struct Taps {
  int64_t depth;
  int64_t w_row;        // of a weight of the next output
  const int64_t* at;    // [depth], of weights
  const int64_t* from;  // [depth], of pixels' lanes in a framed map
};

/// Sizes of one convolution, in pixels.
struct ConvSizes {
  int64_t in, out;         // maps of a group
  int64_t in_y, in_x;      // of the framed input
  int64_t out_y, out_x;    // of the output
  int64_t top, side;       // frames of the output's cotangent
  int64_t back_y, back_x;  // of the framed cotangent
};

inline ConvSizes conv_sizes(const Layer& layer) {
  const auto& n = layer.conv;
  const int64_t reach_y = n.dilation_height * (n.kernel_height - 1), reach_x = n.dilation_width * (n.kernel_width - 1);
  const int64_t in_y = n.height + 2 * n.pad_height, in_x = n.width + 2 * n.pad_width;
  return {n.in / n.groups,
          n.out / n.groups,
          in_y,
          in_x,
          in_y - reach_y,
          in_x - reach_x,
          reach_y - n.pad_height,
          reach_x - n.pad_width,
          n.height + reach_y,
          n.width + reach_x};
}

/// Of a group's input maps, for the output; pixels are `width` elements.
inline Taps forward_taps(const Layer& layer, const ConvSizes& c, int64_t width, Arena& arena) {
  const auto& n = layer.conv;
  const int64_t area = n.kernel_height * n.kernel_width;
  int64_t *at = arena.take<int64_t>(c.in * area), *from = arena.take<int64_t>(c.in * area);
  for (int64_t i = 0, k = 0; i < c.in; ++i)
    for (int64_t y = 0; y < n.kernel_height; ++y)
      for (int64_t x = 0; x < n.kernel_width; ++x, ++k) {
        at[k] = k;
        from[k] = ((i * c.in_y + y * n.dilation_height) * c.in_x + x * n.dilation_width) * width;
      }
  return {c.in * area, c.in * area, at, from};
}

/// Of the output's framed cotangents, for the input's.
inline Taps backward_taps(const Layer& layer, const ConvSizes& c, int64_t width, Arena& arena) {
  const auto& n = layer.conv;
  const int64_t area = n.kernel_height * n.kernel_width;
  int64_t *at = arena.take<int64_t>(c.out * area), *from = arena.take<int64_t>(c.out * area);
  for (int64_t o = 0, k = 0; o < c.out; ++o)
    for (int64_t y = 0; y < n.kernel_height; ++y)
      for (int64_t x = 0; x < n.kernel_width; ++x, ++k) {
        at[k] = o * c.in * area + y * n.kernel_width + x;
        from[k] = ((o * c.back_y + (n.kernel_height - 1 - y) * n.dilation_height) * c.back_x +
                   (n.kernel_width - 1 - x) * n.dilation_width) *
                  width;
      }
  return {c.out * area, area, at, from};
}

/// to[maps, height + 2 top, columns + 2 side] = maps with a frame of zeros; sizes in elements of a row.
template <class T>
void frame(int64_t maps, int64_t height, int64_t columns, int64_t top, int64_t side, const T* from, T* to) {
  const int64_t row = columns + 2 * side;
  for (int64_t m = 0; m < maps; ++m) {
    __builtin_memset(to, 0, (top * row + side) * sizeof(T));
    T* out = to + top * row + side;
    for (int64_t y = 0; y < height; ++y, from += columns, out += row) {
      __builtin_memcpy(out, from, columns * sizeof(T));
      if (y + 1 < height) __builtin_memset(out + columns, 0, 2 * side * sizeof(T));
    }
    __builtin_memset(out - 2 * side, 0, (top * row + side) * sizeof(T));
    to += (height + 2 * top) * row;
  }
}

/// out[outputs, height, columns] (+)= start + the convolution of a framed map x, whose rows have `x_row` elements.
template <class T>
void convolve(int64_t outputs, int64_t height, int64_t columns, const Taps& taps, const T* w, const T* x, int64_t x_row,
              const T* start, bool add, T* out) {
  for (int64_t y = 0; y < height; ++y)
    detail::tap_panels<T, kBlockVectors>(0, columns, outputs, taps.depth, w, taps.w_row, taps.at, x + y * x_row,
                                         taps.from, start, add, out + y * columns, height * columns);
}

/// sums[outputs, depth, lanes] += dz * x, the gradient of the weights, whose lanes are still to be added up.
template <class T>
void convolve_products(int64_t outputs, int64_t height, int64_t columns, const Taps& taps, const T* dz, const T* x,
                       int64_t x_row, T* sums) {
  const int64_t map = height * columns, row = taps.depth * kLanes<T>;
  constexpr int block = kRegisters == 32 ? 4 : 3;
  int64_t o = 0;
  for (; o + block <= outputs; o += block)
    detail::some_tap_products<T, block>(taps.depth, height, columns, dz + o * map, map, columns, x, taps.from, x_row,
                                        sums + o * row, row);
  for (; o < outputs; ++o)
    detail::some_tap_products<T, 1>(taps.depth, height, columns, dz + o * map, map, columns, x, taps.from, x_row,
                                    sums + o * row, row);
}

}  // namespace nodeshape::NODESHAPE_TARGET
