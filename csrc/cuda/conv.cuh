// ConvDynamics of one sample, carried by one team: f = norm3(z2), z2 = conv2(t, relu(norm2(z1))),
// z1 = conv1(t, relu(norm1(y))).
//
// Maps are channels last, [pixels, padded channels]. Convolutions are direct: with one sample a team, the weights are
// read from L2 once a convolution, and Winograd's transformed ones would be four times as many.
#pragma once

#include "arena.cuh"
#include "../groupnorm.h"
#include "../borders.h"
#include "../model.h"
#include "../stage.h"

namespace nodeshape::cuda {

template <class T>
class ConvDynamics;

/// Parameters as the kernels read them; pointers to global memory.
template <class T>
struct ConvWeights {
  using Dynamics = ConvDynamics<T>;
  int64_t channels, height, width, groups;
  const T* gamma[3];  // [padded channels], zero beyond the channels, as all below
  const T* beta[3];
  const T* forward[2];   // [9 taps, padded channels in, padded channels out]
  const T* backward[2];  // the same, transposed and flipped: from output cotangents to input cotangents
  const T* bias[2];      // [padded channels]
  const T* time[2];      // [border classes, padded channels]

  NODESHAPE_FUNCTION int64_t padded_channels() const { return padded<T>(channels); }
  NODESHAPE_FUNCTION int64_t pixels() const { return height * width; }
  NODESHAPE_FUNCTION int64_t filter_elements() const { return 9 * padded_channels() * padded_channels(); }
  /// Elements of the gradient as a team sums it: filters, sums by border class, the same times t, norms.
  NODESHAPE_FUNCTION int64_t gradient_elements() const {
    return 2 * filter_elements() + (2 * 2 * kBorderClasses + 6) * padded_channels();
  }
};

/// Where the parts of a team's gradient begin; filters are as `ConvWeights::forward`.
template <class T>
struct ConvGradient {
  T* filters[2];
  T* borders[2];        // [border classes, padded channels], h times cotangents summed by border class: the bias'
  T* timed_borders[2];  // the same, times t
  T* norms;             // [3, (gamma, beta), padded channels]

  NODESHAPE_FUNCTION ConvGradient(const ConvWeights<T>& w, T* row) {
    const int64_t width = w.padded_channels();
    for (int l = 0; l < 2; ++l) {
      filters[l] = row + l * w.filter_elements();
      borders[l] = row + 2 * w.filter_elements() + 2 * l * kBorderClasses * width;
      timed_borders[l] = borders[l] + kBorderClasses * width;
    }
    norms = row + 2 * w.filter_elements() + 4 * kBorderClasses * width;
  }
};

template <class T>
class ConvDynamics {
  static constexpr int kPack = Pack<T>::kCount;
  static constexpr int kSegment = 4;  // neighbouring pixels of a row that one thread convolves

 public:
  using Scalar = T;
  using Weights = ConvWeights<T>;
  static constexpr int kSamples = 1;

  /// `gradient` is [gradient_elements()] or null.
  NODESHAPE_FUNCTION ConvDynamics(const Weights& weights, Arena& arena, T* gradient, bool with_gradient)
      : w_(weights),
        height_(int(weights.height)),
        map_width_(int(weights.width)),
        segments_(int((weights.width + kSegment - 1) / kSegment)),
        across_(segments_ * kSegment + 2),
        width_(int(weights.padded_channels())),
        framed_(arena.zeros<T>(int64_t(height_ + 2) * across_ * width_)),
        norms_{norm(0, arena), norm(1, arena), norm(2, arena)},
        gradient_(weights, gradient) {
    for (int l = 0; l < 2; ++l) z_[l] = arena.take<T>(size());
    if (!with_gradient) return;
    for (int l = 0; l < 2; ++l) dz_[l] = arena.take<T>(size());
    border_sums_ = arena.take<T>(kBorderClasses * width_);
  }

  NODESHAPE_FUNCTION int64_t size() const { return w_.pixels() * width_; }
  NODESHAPE_FUNCTION int64_t sample() const { return w_.pixels() * w_.channels; }
  NODESHAPE_FUNCTION int64_t kept() const { return kConvMapsKept * sample(); }

  NODESHAPE_FUNCTION void read(const T* tensor, int, T* y) const {
    each_element([=, this](int p, int c, int64_t i) { y[i] = c < w_.channels ? tensor[c * w_.pixels() + p] : T(0); });
  }
  NODESHAPE_FUNCTION void read_cotangent(const T* tensor, int members, T* lambda) const {
    read(tensor, members, lambda);
  }
  NODESHAPE_FUNCTION void write(const T* y, int, T* tensor) const {
    each_element([=, this](int p, int c, int64_t i) {
      if (c < w_.channels) tensor[c * w_.pixels() + p] = y[i];
    });
  }
  NODESHAPE_FUNCTION void pack(const T* y, int, T* row) const {
    each_element([=, this](int p, int c, int64_t i) {
      if (c < w_.channels) row[p * w_.channels + c] = y[i];
    });
  }
  NODESHAPE_FUNCTION void unpack(const T* row, int, T* y) const {
    each_element([=, this](int p, int c, int64_t i) { y[i] = c < w_.channels ? row[p * w_.channels + c] : T(0); });
  }

  /// y and both convolutions' outputs: with them a backward step repeats no convolution of the forward solve.
  NODESHAPE_FUNCTION void keep(int, const T* y, int members, T* row) const {
    pack(y, members, row);
    for (int l = 0; l < 2; ++l) pack(z_[l], members, row + (1 + l) * sample());
  }
  NODESHAPE_FUNCTION void recall(double, const T* const* rows, const int* members, const Batch<T>& batch) {
    y_ = batch.in[0];
    for (int l = 0; l < 2; ++l) {
      unpack(rows[0] + (1 + l) * sample(), members[0], z_[l]);
      norms_[l].prepare(input(l));
    }
    finish(batch.out[0]);
  }

  NODESHAPE_FUNCTION void eval(double t, const Batch<T>& batch) {
    y_ = batch.in[0];
    for (int l = 0; l < 2; ++l) {
      norms_[l].prepare(input(l));
      frame_activations(l);
      T* z = z_[l];
      const T *bias = in_global(w_.bias[l]), *time = in_global(w_.time[l]);
      const T at = T(t);
      convolve(in_global(w_.forward[l]), [=, this](int y, int x, int c, Pack<T> value) {
        const int64_t i = int64_t(y * map_width_ + x) * width_ + c;
        const T* slope = time + border_class(y, x, height_, map_width_) * width_ + c;
        for (int k = 0; k < kPack; ++k) value.lanes[k] += fma(at, slope[k], bias[c + k]);
        store_pack(z + i, value);
      });
    }
    finish(batch.out[0]);
  }

  NODESHAPE_FUNCTION void vjp(const Batch<T>& batch) {
    pull(2, z_[1], batch.in[0], dz_[1]);
    for (int l = 1; l >= 0; --l) {
      const T *dz = dz_[l], *x = input(l);
      frame([=](int64_t i, int) { return dz[i]; });
      // Through the ReLU on the way: its cotangent lands in `to`, which the norm then pulls back in place.
      T* to = l == 1 ? dz_[0] : batch.out[0];
      const GroupNorm<T>& norm = norms_[l];
      convolve(in_global(w_.backward[l]), [=, this, &norm](int y, int x_, int c, Pack<T> value) {
        const int64_t i = int64_t(y * map_width_ + x_) * width_ + c;
        for (int k = 0; k < kPack; ++k)
          if (!(norm.apply(x[i + k], c + k) > T(0))) value.lanes[k] = 0;
        store_pack(to + i, value);
      });
      pull(l, x, to, to);
    }
  }

  NODESHAPE_FUNCTION void accumulate(double t, double h, int) {
    const T scale = T(h), timed = T(h * t);
    time_product_ = 0;
    for (int n = 0; n < 3; ++n) {
      const T *to_gamma = norms_[n].to_gamma(), *to_beta = norms_[n].to_beta();
      T* gradient = gradient_.norms + 2 * n * width_;
      each<T>(width_, [=, this](int64_t c) {
        gradient[c] = fma(scale, to_gamma[c], gradient[c]);
        gradient[width_ + c] = fma(scale, to_beta[c], gradient[width_ + c]);
      });
    }
    for (int l = 0; l < 2; ++l) {
      frame_activations(l);
      add_filter_gradient(scale, dz_[l], in_global(gradient_.filters[l]));
      sum_borders(dz_[l]);
      const T *borders = border_sums_, *map = w_.time[l];
      time_product_ += h * double(total<T>(kBorderClasses * width_, [=](int64_t i) { return borders[i] * map[i]; }));
      T *sums = gradient_.borders[l], *timed_sums = gradient_.timed_borders[l];
      each<T>(kBorderClasses * width_, [=](int64_t i) {
        sums[i] = fma(scale, borders[i], sums[i]);
        timed_sums[i] = fma(timed, borders[i], timed_sums[i]);
      });
    }
  }

  NODESHAPE_FUNCTION double time_product() const { return time_product_; }

  /// What accumulate() gathered is where it belongs.
  NODESHAPE_FUNCTION void take_gradient(T*) {}

 private:
  NODESHAPE_FUNCTION GroupNorm<T> norm(int n, Arena& arena) const {
    return GroupNorm<T>(w_.pixels(), w_.channels, w_.groups, w_.gamma[n], w_.beta[n], arena);
  }

  NODESHAPE_FUNCTION const T* input(int l) const { return l == 0 ? y_ : z_[0]; }

  static NODESHAPE_INLINE T relu(T x) { return T(0) > x ? T(0) : x; }  // keeps NaN

  /// Calls body(pixel, channel, index) for every element of a map.
  template <class Body>
  NODESHAPE_INLINE void each_element(Body&& body) const {
    const int width = width_;
    each<T>(size(), [=](int64_t i) { body(int(i) / width, int(i) % width, i); });
  }

  /// Set the framed map, [2 + height, across, padded channels] with zeros around, to source(index, channel).
  template <class Source>
  NODESHAPE_INLINE void frame(Source&& source) {
    T* framed = framed_;
    each_element([=, this](int p, int c, int64_t i) {
      const int y = p / map_width_, x = p % map_width_;
      framed[int64_t((y + 1) * across_ + x + 1) * width_ + c] = source(i, c);
    });
  }

  /// The framed map = relu(norm(input of layer l)).
  NODESHAPE_INLINE void frame_activations(int l) {
    const T* x = input(l);
    const GroupNorm<T>& norm = norms_[l];
    frame([=, &norm](int64_t i, int c) { return relu(norm.apply(x[i], c)); });
  }

  /// The framed map's convolution: sink(y, x, c, value) for every pixel and pack of output channels c ... c + 3.
  template <class Sink>
  NODESHAPE_INLINE void convolve(const T* weights, Sink&& sink) const {
    const int packs = width_ / kPack;
    spread(height_ * segments_ * packs, [=, this](int64_t task) {
      const int c = int(task) % packs * kPack, segment = int(task) / packs;
      const int y = segment / segments_, x = segment % segments_ * kSegment;
      Pack<T> sums[kSegment] = {};
      for (int tap = 0; tap < 9; tap += 3) {
        const T* row = framed_ + int64_t((y + tap / 3) * across_ + x) * width_;
        const T* filters = weights + int64_t(tap) * width_ * width_ + c;
        for (int i = 0; i < width_; i += kPack) {
          Pack<T> inputs[kSegment + 2];
#pragma unroll
          for (int j = 0; j < kSegment + 2; ++j) inputs[j] = load_pack(row + j * width_ + i);
#pragma unroll
          for (int k = 0; k < kPack; ++k)
#pragma unroll
            for (int across = 0; across < 3; ++across) {
              const Pack<T> w = load_pack(filters + int64_t(across * width_ + i + k) * width_);
#pragma unroll
              for (int j = 0; j < kSegment; ++j)
#pragma unroll
                for (int o = 0; o < kPack; ++o)
                  sums[j].lanes[o] = fma(inputs[j + across].lanes[k], w.lanes[o], sums[j].lanes[o]);
            }
        }
      }
#pragma unroll
      for (int j = 0; j < kSegment; ++j)
        if (x + j < map_width_) sink(y, x + j, c, sums[j]);
    });
  }

  /// filters += scale times the sum over pixels of framed activations and the output cotangents dz: each thread three
  /// neighbouring taps of 4 x 4 channels at a time.
  NODESHAPE_FUNCTION void add_filter_gradient(T scale, const T* dz, T* filters) const {
    const int packs = width_ / kPack;
    spread(3 * packs * packs, [=, this](int64_t task) {
      const int o = int(task) % packs * kPack, i = int(task) / packs % packs * kPack, down = int(task) / packs / packs;
      Pack<T> sums[3][kPack] = {};
      for (int y = 0; y < height_; ++y) {
        const T* row = framed_ + int64_t((y + down) * across_) * width_ + i;
        const T* cotangents = dz + int64_t(y * map_width_) * width_ + o;
        Pack<T> left = load_pack(row), middle = load_pack(row + width_);
        for (int x = 0; x < map_width_; ++x) {
          const Pack<T> right = load_pack(row + (x + 2) * width_), d = load_pack(cotangents + x * width_);
#pragma unroll
          for (int k = 0; k < kPack; ++k)
#pragma unroll
            for (int j = 0; j < kPack; ++j) {
              sums[0][k].lanes[j] = fma(left.lanes[k], d.lanes[j], sums[0][k].lanes[j]);
              sums[1][k].lanes[j] = fma(middle.lanes[k], d.lanes[j], sums[1][k].lanes[j]);
              sums[2][k].lanes[j] = fma(right.lanes[k], d.lanes[j], sums[2][k].lanes[j]);
            }
          left = middle;
          middle = right;
        }
      }
#pragma unroll
      for (int across = 0; across < 3; ++across)
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          T* to = filters + int64_t((3 * down + across) * width_ + i + k) * width_ + o;
          Pack<T> sum = load_pack(to);
          for (int j = 0; j < kPack; ++j) sum.lanes[j] = fma(scale, sums[across][k].lanes[j], sum.lanes[j]);
          store_pack(to, sum);
        }
    });
  }

  /// out = norm3(z2)
  NODESHAPE_FUNCTION void finish(T* out) {
    GroupNorm<T>& norm = norms_[2];
    const T* z = z_[1];
    norm.prepare(z);
    each_element([=, &norm](int, int c, int64_t i) { out[i] = norm.apply(z[i], c); });
  }

  /// dx of norm n at x whose output has the cotangent g; dx may be g.
  NODESHAPE_FUNCTION void pull(int n, const T* x, const T* g, T* dx) {
    GroupNorm<T>& norm = norms_[n];
    norm.prepare_pull(x, g);
    each_element([=, &norm](int, int c, int64_t i) { dx[i] = norm.pull(x[i], g[i], c); });
  }

  struct Span {
    int first, end;
  };
  /// Rows (or columns) of `extent` that touch the first border, the last, both, or neither.
  static NODESHAPE_INLINE Span touching(bool begin, bool end, int extent) {
    if (begin) return {0, int(end == (extent == 1))};
    if (end) return {extent - 1, extent > 1 ? extent : extent - 1};
    return {1, extent - 1};
  }

  /// border_sums_ = sums of dz over the pixels of each border.
  NODESHAPE_FUNCTION void sum_borders(const T* dz) {
    T* borders = border_sums_;
    spread(kBorderClasses * width_, [=, this](int64_t i) {
      const int border = int(i) / width_, c = int(i) % width_;
      const Span down = touching(border & 1, border & 2, height_),
                 across = touching(border & 4, border & 8, map_width_);
      T sum = 0;
      for (int y = down.first; y < down.end; ++y)
        for (int x = across.first; x < across.end; ++x) sum += dz[int64_t(y * map_width_ + x) * width_ + c];
      borders[i] = sum;
    });
  }

  const Weights& w_;
  const int height_, map_width_, segments_, across_;  // across: columns of the framed map
  const int width_;                                   // padded channels
  T* const framed_;
  GroupNorm<T> norms_[3];
  const T* y_ = nullptr;
  T* z_[2];                   // outputs of the convolutions
  T* dz_[2] = {};             // their cotangents
  T* border_sums_ = nullptr;  // [border classes, padded channels]
  ConvGradient<T> gradient_;
  double time_product_ = 0;
};

}  // namespace nodeshape::cuda
