// 3x3 convolutions of maps whose pixels are rows of `width` lanes, a lane per sample, by Winograd's F(4x4, 3x3): 36
// matrix products of channels, whose columns are tiles of the map and lanes. See winograd.h.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "transpose.h"
#include "winograd.h"

namespace nodeshape::NODESHAPE_TARGET {

/// One convolution of one group: maps [in, height, width] in a frame of zeros to maps [out, out_height, out_width].
struct WinogradMap {
  int64_t in, out, height, width, top, left, out_height, out_width;

  int64_t tiles_across() const { return (out_width + 3) / 4; }
  int64_t tiles() const { return (out_height + 3) / 4 * tiles_across(); }

  /// Whether it is less work than the products themselves, and enough of it.
  bool pays() const { return in >= 8 && out >= 8 && double(out_height * out_width) >= 0.5 * 16.0 * double(tiles()); }
};

template <class T>
class Winograd {
 public:
  static constexpr int64_t kWide = kLanes<T>;

  /// `weight(o, i, tap)` is the filter's; `with_gradient` if weight_gradient() will be called.
  template <class Weight>
  Winograd(const WinogradMap& map, int64_t width, Arena& arena, bool with_gradient, Weight&& weight)
      : map_(map), width_(width) {
    constexpr int64_t kMostBytes = 1 << 18;  // of transformed maps, which should stay in the cache
    const int64_t tile = winograd::kProducts * (map.in + map.out) * width * int64_t(sizeof(T));
    block_ = map.tiles();
    while (block_ > 1 && block_ * tile > kMostBytes && block_ * width > 2 * kWide) block_ = (block_ + 1) / 2;
    inputs_ = arena.take<T>(winograd::kProducts * stride(map.in));
    outputs_ = arena.take<T>(winograd::kProducts * stride(map.out));
    nothing_ = arena.zeros<T>(width);
    filters_ = arena.take<T>(winograd::kProducts * map.out * padded<T>(map.in));
    transform_filters(weight);
    if (!with_gradient) return;
    gradient_ = arena.zeros<T>(winograd::kProducts * map.out * padded<T>(map.in));
    turned_ = arena.zeros<T>(block_ * width * padded<T>(map.in));
  }

  /// out (+)= start + the convolution of x; `start` is one number per output channel, or null.
  NODESHAPE_OUTLINE void convolve(const T* x, const T* start, bool add, T* out) {
    held_ = block_ == map_.tiles() ? x : nullptr;
    for (int64_t first = 0; first < map_.tiles(); first += block_) {
      const int64_t count = tiles_from(first), columns = count * width_;
      transform_inputs(x, first, count);
      for (int xi = 0; xi < winograd::kProducts; ++xi)
        gemm<T, false>(map_.out, columns, map_.in,
                       {filters_ + xi * map_.out * padded<T>(map_.in), padded<T>(map_.in), 1},
                       inputs_ + xi * stride(map_.in), columns, outputs_ + xi * stride(map_.out), columns);
      transform_outputs(start, add, first, count, out);
    }
  }

  /// Gather the gradient of the filter, for cotangents d of the output of the latest convolve() of x.
  NODESHAPE_OUTLINE void weight_gradient(const T* x, const T* d) {
    const int64_t in = padded<T>(map_.in);
    for (int64_t first = 0; first < map_.tiles(); first += block_) {
      const int64_t count = tiles_from(first), columns = count * width_;
      if (held_ != x) transform_inputs(x, first, count);
      transform_cotangents(d, first, count);
      for (int xi = 0; xi < winograd::kProducts; ++xi) {
        transpose<T>(map_.in, columns, inputs_ + xi * stride(map_.in), columns, turned_, in);
        gemm<T, true>(map_.out, in, columns, {outputs_ + xi * stride(map_.out), columns, 1}, turned_, in,
                      gradient_ + xi * map_.out * in, in);
      }
    }
  }

  /// Add what weight_gradient() gathered to `row` [out, in, 3, 3], and start again from zero.
  NODESHAPE_OUTLINE void take_gradient(T* row) {
    const int64_t in = padded<T>(map_.in);
    for (int64_t o = 0; o < map_.out; ++o)
      for (int64_t i = 0; i < map_.in; i += kWide) {
        Vec<T> u[6][6], g[3][3];
        for (int xi = 0; xi < winograd::kProducts; ++xi)
          u[xi / 6][xi % 6] = load(gradient_ + (xi * map_.out + o) * in + i);
        winograd::both_ways<T>(u, g, [](const auto& a, auto& b) { winograd::filter_transposed<T>(a, b); });
        for (int64_t lane = 0; lane < kWide && i + lane < map_.in; ++lane)
          for (int tap = 0; tap < 9; ++tap) row[(o * map_.in + i + lane) * 9 + tap] += g[tap / 3][tap % 3][lane];
      }
    __builtin_memset(gradient_, 0, winograd::kProducts * map_.out * in * sizeof(T));
  }

 private:
  int64_t tiles_from(int64_t first) const {
    const int64_t left = map_.tiles() - first;
    return left < block_ ? left : block_;
  }
  /// Between products: a cache line more than they need, as a transform writes all 36 at once.
  int64_t stride(int64_t channels) const { return channels * block_ * width_ + 64 / int64_t(sizeof(T)); }

  template <class Weight>
  void transform_filters(Weight&& weight) {
    const int64_t in = padded<T>(map_.in);
    for (int64_t o = 0; o < map_.out; ++o)
      for (int64_t i = 0; i < in; i += kWide) {
        Vec<T> g[3][3] = {}, u[6][6];
        for (int64_t lane = 0; lane < kWide && i + lane < map_.in; ++lane)
          for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3][lane] = weight(o, i + lane, tap);
        winograd::both_ways<T>(g, u, [](const auto& a, auto& b) { winograd::filter<T>(a, b); });
        for (int xi = 0; xi < winograd::kProducts; ++xi)
          store(filters_ + (xi * map_.out + o) * in + i, u[xi / 6][xi % 6]);
      }
  }

  /// Calls body(column, tile's top, tile's left in the output) for some tiles.
  template <class Body>
  NODESHAPE_INLINE void each_tile(int64_t first, int64_t count, Body&& body) const {
    for (int64_t tile = 0; tile < count; ++tile)
      body(tile * width_, (first + tile) / map_.tiles_across() * 4, (first + tile) % map_.tiles_across() * 4);
  }

  void transform_inputs(const T* x, int64_t first, int64_t count) const {
    const int64_t columns = count * width_, stride_in = stride(map_.in), area = map_.height * map_.width * width_;
    each_tile(first, count, [&](int64_t column, int64_t top, int64_t left) {
      int64_t at[36];  // of the patch's pixels, -1 outside of the map
      for (int k = 0; k < 36; ++k) {
        const int64_t y = top - map_.top + k / 6, z = left - map_.left + k % 6;
        at[k] = y >= 0 && y < map_.height && z >= 0 && z < map_.width ? (y * map_.width + z) * width_ : -1;
      }
      for (int64_t i = 0; i < map_.in; ++i)
        for (int64_t v = 0; v < width_; v += kWide) {
          const T* from = x + i * area;
          T* to = inputs_ + i * columns + column + v;
          Vec<T> patch[6][6], u[6][6];
#pragma GCC unroll 36
          for (int k = 0; k < 36; ++k) patch[k / 6][k % 6] = load((at[k] < 0 ? nothing_ : from + at[k]) + v);
          winograd::both_ways<T>(patch, u, [](const auto& a, auto& b) { winograd::input<T>(a, b); });
#pragma GCC unroll 36
          for (int xi = 0; xi < 36; ++xi) store(to + xi * stride_in, u[xi / 6][xi % 6]);
        }
    });
  }

  void transform_outputs(const T* start, bool add, int64_t first, int64_t count, T* out) const {
    const int64_t columns = count * width_, stride_out = stride(map_.out);
    each_tile(first, count, [&](int64_t column, int64_t top, int64_t left) {
      const int64_t rows = map_.out_height - top, across = map_.out_width - left;
      for (int64_t o = 0; o < map_.out; ++o)
        for (int64_t v = 0; v < width_; v += kWide) {
          const T* from = outputs_ + o * columns + column + v;
          T* to = out + ((o * map_.out_height + top) * map_.out_width + left) * width_ + v;
          Vec<T> m[6][6], y[4][4];
#pragma GCC unroll 36
          for (int xi = 0; xi < 36; ++xi) m[xi / 6][xi % 6] = load(from + xi * stride_out);
          winograd::both_ways<T>(m, y, [](const auto& a, auto& b) { winograd::output<T>(a, b); });
          const Vec<T> shift = start == nullptr ? Vec<T>{} : splat(start[o]);
          for (int64_t i = 0; i < 4 && i < rows; ++i)
            for (int64_t j = 0; j < 4 && j < across; ++j) {
              T* pixel = to + (i * map_.out_width + j) * width_;
              store(pixel, add ? load(pixel) + y[i][j] : y[i][j] + shift);
            }
        }
    });
  }

  /// A z A^T of cotangents, into `outputs_`.
  void transform_cotangents(const T* d, int64_t first, int64_t count) const {
    const int64_t columns = count * width_, stride_out = stride(map_.out);
    each_tile(first, count, [&](int64_t column, int64_t top, int64_t left) {
      const int64_t rows = map_.out_height - top, across = map_.out_width - left;
      for (int64_t o = 0; o < map_.out; ++o)
        for (int64_t v = 0; v < width_; v += kWide) {
          const T* from = d + ((o * map_.out_height + top) * map_.out_width + left) * width_ + v;
          T* to = outputs_ + o * columns + column + v;
          Vec<T> z[4][4], m[6][6];
#pragma GCC unroll 16
          for (int k = 0; k < 16; ++k)
            z[k / 4][k % 4] =
                load(k / 4 < rows && k % 4 < across ? from + (k / 4 * map_.out_width + k % 4) * width_ : nothing_);
          winograd::both_ways<T>(z, m, [](const auto& a, auto& b) { winograd::output_transposed<T>(a, b); });
#pragma GCC unroll 36
          for (int xi = 0; xi < 36; ++xi) store(to + xi * stride_out, m[xi / 6][xi % 6]);
        }
    });
  }

  const WinogradMap map_;
  const int64_t width_;
  int64_t block_;            // tiles at a time
  const T* held_ = nullptr;  // whose transform is in `inputs_`
  T *inputs_, *outputs_;     // [36, channels, block * width]
  T* nothing_;               // [width]
  T* filters_;               // [36, out, padded in]
  T* gradient_ = nullptr;    // the same
  T* turned_ = nullptr;      // [block * width, padded in]
};

}  // namespace nodeshape::NODESHAPE_TARGET
