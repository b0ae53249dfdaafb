// The 3x3 convolutions of a few feature maps at once, in the Winograd domain.
//
// Maps are channels last, [height, width, padded channels], so that every transform is a transform of vectors of
// channels. A map has `tiles` tiles; a batch of maps has rows = maps * tiles of them, and transformed inputs and
// outputs are [36, rows, padded channels]: 36 matrix products. The products lie product_stride() apart.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "share.h"
#include "winograd.h"

namespace nodeshape::NODESHAPE_TARGET {

struct MapShape {
  int64_t channels, height, width;

  int64_t pixels() const { return height * width; }
  int64_t tiles_down() const { return (height + winograd::kTile - 1) / winograd::kTile; }
  int64_t tiles_across() const { return (width + winograd::kTile - 1) / winograd::kTile; }
  int64_t tiles() const { return tiles_down() * tiles_across(); }
};

/// Distance between the 36 products of `rows` by `width` elements: a cache line more than they need, because a
/// transform touches all 36 at once and a power of two would put them into the same few places of the cache.
template <class T>
NODESHAPE_INLINE int64_t product_stride(int64_t rows, int64_t width) {
  return rows * width + 64 / int64_t(sizeof(T));
}

/// Calls body(row, tile's top, tile's left) for each tile of a map whose first tile is row `row`.
template <class Body>
NODESHAPE_INLINE void each_tile(const MapShape& shape, int64_t row, Body&& body) {
  for (int64_t top = 0; top < shape.height; top += winograd::kTile)
    for (int64_t left = 0; left < shape.width; left += winograd::kTile) body(row++, top, left);
}

/// A feature map in a frame of zeros as wide as the tiles' patches reach: [framed height, framed width, padded
/// channels].
template <class T>
class FramedMap {
 public:
  FramedMap(const MapShape& shape, Arena& arena)
      : shape_(shape),
        channels_(padded<T>(shape.channels)),
        across_(shape.tiles_across() * winograd::kTile + 2),
        elements_(arena.zeros<T>((shape.tiles_down() * winograd::kTile + 2) * across_ * channels_)) {}

  /// Set some channels of the map: source(pixel, channel vector c) everywhere inside the frame.
  template <class Source>
  void set(Span channels, Source&& source) {
    for (int64_t y = 0, pixel = 0; y < shape_.height; ++y)
      for (int64_t x = 0; x < shape_.width; ++x, ++pixel) {
        T* to = elements_ + ((y + 1) * across_ + x + 1) * channels_;
        each<T>(channels, [&](int64_t c) { store(to + c, source(pixel, c)); });
      }
  }

  /// V = B^T d B for the tiles of the map, which are rows first_row ... of `rows`.
  void transform(Span channels, int64_t rows, int64_t first_row, T* transformed) const {
    each_tile(shape_, first_row, [&](int64_t row, int64_t top, int64_t left) {
      const T* corner = elements_ + (top * across_ + left) * channels_;
      T* to = transformed + row * channels_;
      const int64_t stride = product_stride<T>(rows, channels_);
      each<T>(channels, [&](int64_t c) {
        Vec<T> patch[6][6], v[6][6];
#pragma GCC unroll 36
        for (int k = 0; k < 36; ++k) patch[k / 6][k % 6] = load(corner + ((k / 6) * across_ + k % 6) * channels_ + c);
        winograd::both_ways<T>(patch, v, [](const auto& a, auto& b) { winograd::input<T>(a, b); });
#pragma GCC unroll 36
        for (int xi = 0; xi < 36; ++xi) store(to + xi * stride + c, v[xi / 6][xi % 6]);
      });
    });
  }

 private:
  MapShape shape_;
  int64_t channels_, across_;
  T* elements_;
};

/// A z A^T for the tiles of one map of output cotangents, the form in which the filter's gradient sums them.
template <class T, class Source>
void transform_cotangents(const MapShape& shape, int64_t rows, int64_t first_row, T* transformed, Source&& source) {
  const int64_t channels = padded<T>(shape.channels);
  each_tile(shape, first_row, [&](int64_t row, int64_t top, int64_t left) {
    const int64_t last_i = shape.height - top, last_j = shape.width - left, corner = top * shape.width + left;
    T* to = transformed + row * channels;
    const int64_t stride = product_stride<T>(rows, channels);
    each<T>(channels, [&](int64_t c) {
      Vec<T> z[4][4], m[6][6];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          z[i][j] = i < last_i && j < last_j ? source(corner + i * shape.width + j, c) : Vec<T>{};
      winograd::both_ways<T>(z, m, [](const auto& a, auto& b) { winograd::output_transposed<T>(a, b); });
#pragma GCC unroll 36
      for (int xi = 0; xi < 36; ++xi) store(to + xi * stride + c, m[xi / 6][xi % 6]);
    });
  });
}

/// Filters [channels out, channels in, 3, 3] in the Winograd domain, packed panel by panel of output channels.
template <class T>
class Filters {
 public:
  Filters(int64_t channels, Arena& arena)
      : channels_(channels), transformed_(arena.take<T>(winograd::kProducts * padded<T>(channels) * (channels + 1))) {}

  /// Vectors of output channels, which transform() takes one at a time.
  int64_t vectors() const { return padded<T>(channels_) / kLanes<T>; }

  /// Set the filters to output channels v lanes ... (v + 1) lanes; weight(o, i, tap) is the one from channel i to o.
  template <class Weight>
  void transform(int64_t v, Weight&& weight) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t o = v * lanes;
    for (int64_t i = 0; i < channels_; ++i) {
      T taps[9][lanes];
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int tap = 0; tap < 9; ++tap) taps[tap][lane] = o + lane < channels_ ? weight(o + lane, i, tap) : T(0);
      Vec<T> g[3][3], u[6][6];
      for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = load(taps[tap]);
      winograd::both_ways<T>(g, u, [](const auto& a, auto& b) { winograd::filter<T>(a, b); });
      T* to = transformed_ + place(0, i, o);
      const int64_t stride = place(1, i, o) - place(0, i, o);
      for (int xi = 0; xi < 36; ++xi) store(to + xi * stride, u[xi / 6][xi % 6]);
    }
  }

  /// Convolve: sink(map, pixel, channel vector c, value) of every output in some channels. `outputs` is scratch of
  /// 36 product_stride(rows, panel).
  template <class Sink>
  void apply(Span channels, const MapShape& shape, int64_t maps, const T* inputs, T* outputs, Sink&& sink) const {
    panels<kBlockVectors>(0, channels, shape, maps, inputs, outputs, sink);
  }

  /// Widest panel, for sizing the scratch of apply().
  static constexpr int64_t kPanel = kBlockVectors * kLanes<T>;

 private:
  /// Where filter (o, i) has its product xi. A panel keeps one row of room after each product, to the same end as
  /// product_stride().
  int64_t place(int64_t xi, int64_t i, int64_t o) const {
    const int64_t columns = padded<T>(channels_);
    int64_t from = 0, width = kPanel;
    while (true) {
      while (from + width > columns) width /= 2;
      if (o < from + width) return (from * winograd::kProducts + xi * width) * (channels_ + 1) + i * width + (o - from);
      from += width;
    }
  }

  template <int Vectors, class Sink>
  void panels(int64_t from, Span channels, const MapShape& shape, int64_t maps, const T* inputs, T* outputs,
              Sink&& sink) const {
    constexpr int64_t width = Vectors * kLanes<T>;
    const int64_t columns = padded<T>(channels_), rows = maps * shape.tiles();
    const int64_t in_stride = product_stride<T>(rows, columns), out_stride = product_stride<T>(rows, width);
    for (; from + width <= columns; from += width) {
      const Span part{larger(channels.begin - from, 0), smaller(channels.end - from, width)};
      if (part.begin >= part.end) continue;
      for (int64_t xi = 0; xi < winograd::kProducts; ++xi)
        detail::panels<T, Vectors, false>(part.begin, rows, part.end, channels_, {inputs + xi * in_stride, columns, 1},
                                          transformed_ + place(xi, 0, from), width, nullptr, outputs + xi * out_stride,
                                          width);
      for (int64_t map = 0; map < maps; ++map)
        each_tile(shape, map * shape.tiles(), [&](int64_t row, int64_t top, int64_t left) {
          const int64_t last_i = shape.height - top, last_j = shape.width - left, corner = top * shape.width + left;
          each<T>(part, [&](int64_t c) {
            const T* at = outputs + row * width + c;
            Vec<T> m[6][6], y[4][4];
#pragma GCC unroll 36
            for (int xi = 0; xi < 36; ++xi) m[xi / 6][xi % 6] = load(at + xi * out_stride);
            winograd::both_ways<T>(m, y, [](const auto& a, auto& b) { winograd::output<T>(a, b); });
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
              for (int j = 0; j < 4; ++j)
                if (i < last_i && j < last_j) sink(map, corner + i * shape.width + j, from + c, y[i][j]);
          });
        });
    }
    if constexpr (Vectors > 1)
      if (from < columns) panels<Vectors / 2>(from, channels, shape, maps, inputs, outputs, sink);
  }

  int64_t channels_;
  T* transformed_;
};

/// The gradient of a convolution's filters, summed in the Winograd domain: sum over tiles of V M^T.
template <class T>
class FilterGradient {
 public:
  FilterGradient(int64_t channels, Arena& arena)
      : channels_(channels), sums_(arena.zeros<T>(winograd::kProducts * channels * padded<T>(channels))) {}

  /// inputs and cotangents are [36, rows, padded channels].
  void add(int64_t rows, const T* inputs, const T* cotangents) {
    const int64_t columns = padded<T>(channels_), stride = product_stride<T>(rows, columns);
    for (int64_t xi = 0; xi < winograd::kProducts; ++xi)
      gemm<T, true>(channels_, columns, rows, {inputs + xi * stride, 1, columns}, cotangents + xi * stride, columns,
                    sums_ + xi * channels_ * columns, columns);
  }

  /// Calls sink(o, i, taps[9]) for every filter and starts again from zero.
  template <class Sink>
  void take(Sink&& sink) {
    const int64_t columns = padded<T>(channels_);
    for (int64_t i = 0; i < channels_; ++i)
      each<T>(columns, [&](int64_t o) {
        Vec<T> u[6][6], g[3][3];
        for (int xi = 0; xi < 36; ++xi) {
          T* sum = sums_ + (xi * channels_ + i) * columns + o;
          u[xi / 6][xi % 6] = load(sum);
          store(sum, Vec<T>{});
        }
        winograd::both_ways<T>(u, g, [](const auto& a, auto& b) { winograd::filter_transposed<T>(a, b); });
        for (int64_t lane = 0; lane < kLanes<T> && o + lane < channels_; ++lane) {
          T taps[9];
          for (int tap = 0; tap < 9; ++tap) taps[tap] = g[tap / 3][tap % 3][lane];
          sink(o + lane, i, taps);
        }
      });
  }

 private:
  int64_t channels_;
  T* sums_;
};

}  // namespace nodeshape::NODESHAPE_TARGET
