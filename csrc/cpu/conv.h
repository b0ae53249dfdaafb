// ConvDynamics: f = norm3(z2), z2 = conv2(t, relu(norm2(z1))), z1 = conv1(t, relu(norm1(y))).
//
// Time is a constant input channel, so all it does is shift a convolution's output by t times a map that depends on
// nothing but which borders a pixel touches; bias and time together are sixteen vectors of channels, one for each
// border class of pixels.
#pragma once

#include "conv3x3.h"
#include "kernels.h"
#include "team.h"
#include "../groupnorm.h"
#include "../borders.h"
#include "../stage.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Parameters as the kernels read them.
template <class T>
struct ConvWeights {
  MapShape shape;
  int64_t groups;
  const int* borders;  // [pixels]
  const T* gamma[3];   // [padded channels]
  const T* beta[3];
  struct Layer {
    Filters<T>* forward;
    Filters<T>* backward;  // transposed and flipped: from output cotangents to input cotangents
    const T* bias;         // [padded channels]
    const T* time;         // [border classes, padded channels]
  } layers[2];

  ConvWeights(const ConvModel& model, Arena& arena, const Executor& executor, bool with_gradient)
      : shape{model.channels, model.height, model.width}, groups(model.groups) {
    const int64_t c = shape.channels;
    int* border = arena.take<int>(shape.pixels());
    borders = border;
    for (int64_t y = 0; y < shape.height; ++y)
      for (int64_t x = 0; x < shape.width; ++x) *border++ = border_class(y, x, shape.height, shape.width);
    const auto parameter = [&](int i) { return static_cast<const T*>(model.parameters[i]); };
    for (int n = 0; n < 3; ++n) {
      gamma[n] = padded_row(parameter(4 * n), arena);
      beta[n] = padded_row(parameter(4 * n + 1), arena);
    }
    for (int l = 0; l < 2; ++l) {
      const T* weight = parameter(4 * l + 2);
      layers[l].forward = new (arena.take<Filters<T>>(1)) Filters<T>(c, arena);
      layers[l].backward = with_gradient ? new (arena.take<Filters<T>>(1)) Filters<T>(c, arena) : nullptr;
      layers[l].bias = padded_row(parameter(4 * l + 3), arena);
      T* time = arena.zeros<T>(kBorderClasses * padded<T>(c));
      for (int border = 0; border < kBorderClasses; ++border)
        for (int64_t o = 0; o < c; ++o)
          for (int tap = 0; tap < 9; ++tap)
            if (inside(tap, border)) time[border * padded<T>(c) + o] += weight[o * (c + 1) * 9 + tap];
      layers[l].time = time;
    }
    const int64_t vectors = layers[0].forward->vectors(), directions = with_gradient ? 2 : 1;
    share(executor, 2 * directions * vectors, [&](int64_t task, Arena&) {
      const int64_t v = task % vectors, l = task / vectors % 2;
      const T* weight = parameter(4 * l + 2);
      const auto filter = [=](int64_t o, int64_t i, int tap) { return weight[(o * (c + 1) + i + 1) * 9 + tap]; };
      if (task / vectors < 2)
        layers[l].forward->transform(v, filter);
      else
        layers[l].backward->transform(v, [=](int64_t i, int64_t o, int tap) { return filter(o, i, 8 - tap); });
    });
  }

  int64_t parameters() const { return 6 * shape.channels + 2 * shape.channels * (9 * (shape.channels + 1) + 1); }

  /// As many samples as give the matrix products rows enough to be worth fetching the filters.
  int64_t group() const {
    constexpr int64_t kRows = 16, kMost = 4;
    const int64_t samples = kRows / shape.tiles();
    return samples < 1 ? 1 : samples > kMost ? kMost : samples;
  }
  /// Smallest pieces that an evaluation can be cut into: whole vectors of channels and whole groups.
  int64_t pieces() const {
    const int64_t members = shape.channels / groups, width = padded<T>(shape.channels);
    const int64_t piece = members <= kLanes<T> ? kLanes<T> : members;
    return piece % members == 0 && piece % kLanes<T> == 0 && width % piece == 0 ? width / piece : 1;
  }
  double cost() const { return 100 + 0.02 * (double(parameters()) * double(shape.pixels())); }

 private:
  const T* padded_row(const T* values, Arena& arena) const {
    T* row = arena.zeros<T>(padded<T>(shape.channels));
    __builtin_memcpy(row, values, shape.channels * sizeof(T));
    return row;
  }
};

template <class T>
class ConvDynamics {
 public:
  using Scalar = T;
  using Weights = ConvWeights<T>;
  static constexpr int kSamples = 1;

  ConvDynamics(const Weights& weights, Arena& arena, int group, bool with_gradient)
      : w_(weights), shape_(weights.shape), width_(padded<T>(shape_.channels)), framed_(shape_, arena) {
    const int64_t rows = group * shape_.tiles();
    inputs_ = arena.take<T>(winograd::kProducts * product_stride<T>(rows, width_));
    outputs_ = arena.take<T>(winograd::kProducts * product_stride<T>(rows, width_));
    for (int s = 0; s < group; ++s) {
      Slot& slot = slots_[s];
      for (int n = 0; n < 3; ++n)
        slot.norm[n] = new (arena.take<GroupNorm<T>>(1))
            GroupNorm<T>(shape_.pixels(), shape_.channels, w_.groups, w_.gamma[n], w_.beta[n], arena);
      for (int l = 0; l < 2; ++l) {
        slot.z[l] = arena.take<T>(size());
        slot.dz[l] = with_gradient ? arena.take<T>(size()) : nullptr;
      }
    }
    for (int l = 0; l < 2; ++l) shift_[l] = arena.take<T>(kBorderClasses * width_);
    if (!with_gradient) return;
    border_sums_ = arena.take<T>(kBorderClasses * width_);
    norm_gradient_ = arena.zeros<T>(6 * width_);
    for (int l = 0; l < 2; ++l) {
      filter_gradient_[l] = new (arena.take<FilterGradient<T>>(1)) FilterGradient<T>(shape_.channels, arena);
      bias_gradient_[l] = arena.zeros<T>(width_);
      time_gradient_[l] = arena.zeros<T>(kBorderClasses * width_);
    }
  }

  /// Evaluate with the help of a team from now on; the dynamics is one of a single sample.
  void join(Team& team, Arena& arena) {
    team_ = &team;
    for (int i = 0; i < team.size(); ++i)
      products_[i] =
          arena.take<T>(winograd::kProducts * product_stride<T>(shape_.tiles(), smaller(width_, Filters<T>::kPanel)));
  }

  int64_t size() const { return shape_.pixels() * width_; }
  int64_t sample() const { return shape_.pixels() * shape_.channels; }
  int64_t kept() const { return kConvMapsKept * sample(); }

  void read(const T* tensor, int, T* y) const {
    const int64_t pixels = shape_.pixels(), channels = shape_.channels;
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) y[p * width_ + c] = tensor[c * pixels + p];
      for (int64_t c = channels; c < width_; ++c) y[p * width_ + c] = 0;
    }
  }
  void read_cotangent(const T* tensor, int members, T* lambda) const { read(tensor, members, lambda); }
  void write(const T* y, int, T* tensor) const {
    const int64_t pixels = shape_.pixels(), channels = shape_.channels;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < pixels; ++p) tensor[c * pixels + p] = y[p * width_ + c];
  }
  void pack(const T* y, int, T* row) const {
    for (int64_t p = 0; p < shape_.pixels(); ++p)
      __builtin_memcpy(row + p * shape_.channels, y + p * width_, shape_.channels * sizeof(T));
  }
  void unpack(const T* row, int, T* y) const {
    for (int64_t p = 0; p < shape_.pixels(); ++p) {
      __builtin_memcpy(y + p * width_, row + p * shape_.channels, shape_.channels * sizeof(T));
      for (int64_t c = shape_.channels; c < width_; ++c) y[p * width_ + c] = 0;
    }
  }

  /// y and both convolutions' outputs: with them a backward step repeats no convolution of the forward solve.
  void keep(int s, const T* y, int members, T* row) const {
    pack(y, members, row);
    for (int l = 0; l < 2; ++l) pack(slots_[s].z[l], members, row + (1 + l) * sample());
  }
  void recall(double, const T* const* rows, const int* members, const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) {
      const int s = batch.slot[i];
      Slot& slot = slots_[s];
      slot.y = batch.in[i];
      for (int l = 0; l < 2; ++l) {
        unpack(rows[s] + (1 + l) * sample(), members[s], slot.z[l]);
        slot.norm[l]->prepare(slot.input(l));
      }
      finish(all(), slot, batch.out[i]);
    }
  }

  void eval(double t, const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) slots_[batch.slot[i]].y = batch.in[i];
    for (int l = 0; l < 2; ++l) {
      together([&](Span channels, T*) {
        for (int i = 0; i < batch.count; ++i) {
          Slot& slot = slots_[batch.slot[i]];
          slot.norm[l]->prepare(slot.input(l), channels.begin, channels.end - channels.begin);
          transform_activations(channels, slot, l, batch.count, i);
        }
      });
      const Vec<T> time = splat(T(t));
      T* shift = shift_[l];
      const typename Weights::Layer& layer = w_.layers[l];
      for (int border = 0; border < kBorderClasses; ++border)
        each<T>(width_, [&](int64_t c) {
          store(shift + border * width_ + c, fma(time, load(layer.time + border * width_ + c), load(layer.bias + c)));
        });
      together([&](Span channels, T* products) {
        layer.forward->apply(
            channels, shape_, batch.count, inputs_, products, [&](int64_t map, int64_t p, int64_t c, Vec<T> value) {
              store(slots_[batch.slot[map]].z[l] + p * width_ + c, value + load(shift + w_.borders[p] * width_ + c));
            });
        for (int i = 0; l == 1 && i < batch.count; ++i) finish(channels, slots_[batch.slot[i]], batch.out[i]);
      });
    }
  }

  void vjp(const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) {
      Slot& slot = slots_[batch.slot[i]];
      pull(*slot.norm[2], slot.z[1], batch.in[i], slot.dz[1]);
    }
    for (int l = 1; l >= 0; --l) {
      for (int i = 0; i < batch.count; ++i) {
        const T* dz = slots_[batch.slot[i]].dz[l];
        framed_.set(all(), [&](int64_t p, int64_t c) { return load(dz + p * width_ + c); });
        framed_.transform(all(), batch.count * shape_.tiles(), i * shape_.tiles(), inputs_);
      }
      // Through the ReLU on the way: its cotangent lands in `to`, which the norm then pulls back in place.
      w_.layers[l].backward->apply(
          all(), shape_, batch.count, inputs_, outputs_, [&](int64_t map, int64_t p, int64_t c, Vec<T> value) {
            const Slot& slot = slots_[batch.slot[map]];
            T* to = l == 1 ? slot.dz[0] : batch.out[map];
            const Vec<T> activation = slot.norm[l]->apply(load(slot.input(l) + p * width_ + c), c);
            store(to + p * width_ + c, activation > Vec<T>{} ? value : Vec<T>{});
          });
      for (int i = 0; i < batch.count; ++i) {
        Slot& slot = slots_[batch.slot[i]];
        T* to = l == 1 ? slot.dz[0] : batch.out[i];
        pull(*slot.norm[l], slot.input(l), to, to);
      }
    }
  }

  void accumulate(double t, double h, int count) {
    const Vec<T> scale = splat(T(h)), timed = splat(T(h * t));
    time_product_ = 0;
    for (int s = 0; s < count; ++s) {
      for (int n = 0; n < 3; ++n) {
        const T *to_gamma = slots_[s].norm[n]->to_gamma(), *to_beta = slots_[s].norm[n]->to_beta();
        T* gradient = norm_gradient_ + 2 * n * width_;
        each<T>(width_, [&](int64_t c) {
          store(gradient + c, fma(scale, load(to_gamma + c), load(gradient + c)));
          store(gradient + width_ + c, fma(scale, load(to_beta + c), load(gradient + width_ + c)));
        });
      }
    }
    const int64_t rows = count * shape_.tiles();
    for (int l = 0; l < 2; ++l) {
      for (int s = 0; s < count; ++s) {
        Slot& slot = slots_[s];
        const T* dz = slot.dz[l];
        transform_activations(all(), slot, l, count, s);
        transform_cotangents<T>(shape_, rows, s * shape_.tiles(), outputs_,
                                [&](int64_t p, int64_t c) { return load(dz + p * width_ + c) * scale; });
        sum_borders(dz);
        const T* map = w_.layers[l].time;
        time_product_ += h * double(total<T>(kBorderClasses * width_,
                                             [&](int64_t i) { return load(border_sums_ + i) * load(map + i); }));
        T *bias = bias_gradient_[l], *time = time_gradient_[l];
        for (int border = 0; border < kBorderClasses; ++border)
          each<T>(width_, [&](int64_t c) {
            const Vec<T> sum = load(border_sums_ + border * width_ + c);
            store(bias + c, fma(scale, sum, load(bias + c)));
            store(time + border * width_ + c, fma(timed, sum, load(time + border * width_ + c)));
          });
      }
      filter_gradient_[l]->add(rows, inputs_, outputs_);
    }
  }

  double time_product() const { return time_product_; }

  /// Hand over what accumulate() gathered, in the order of the parameters, and start again from zero.
  void take_gradient(T* row) {
    const int64_t c = shape_.channels;
    for (int n = 0; n < 3; ++n) {
      for (int which = 0; which < 2; ++which) {
        T* gradient = norm_gradient_ + (2 * n + which) * width_;
        for (int64_t i = 0; i < c; ++i) *row++ = gradient[i];
        __builtin_memset(gradient, 0, width_ * sizeof(T));
      }
      if (n == 2) break;
      filter_gradient_[n]->take([&](int64_t o, int64_t i, const T* taps) {
        __builtin_memcpy(row + (o * (c + 1) + i + 1) * 9, taps, 9 * sizeof(T));
      });
      for (int64_t o = 0; o < c; ++o)
        for (int tap = 0; tap < 9; ++tap) {
          T sum = 0;
          for (int border = 0; border < kBorderClasses; ++border)
            if (inside(tap, border)) sum += time_gradient_[n][border * width_ + o];
          row[o * (c + 1) * 9 + tap] = sum;
        }
      row += c * (c + 1) * 9;
      for (int64_t o = 0; o < c; ++o) *row++ = bias_gradient_[n][o];
      __builtin_memset(bias_gradient_[n], 0, width_ * sizeof(T));
      __builtin_memset(time_gradient_[n], 0, kBorderClasses * width_ * sizeof(T));
    }
  }

 private:
  /// What eval() and vjp() leave of a sample.
  struct Slot {
    const T* y;
    T* z[2];   // outputs of the convolutions, [pixels, padded channels]
    T* dz[2];  // their cotangents
    GroupNorm<T>* norm[3];

    const T* input(int l) const { return l == 0 ? y : z[0]; }
  };

  Span all() const { return {0, width_}; }

  /// Calls body(channels, scratch for products) for ranges of channels that make up all of them, side by side if there
  /// is a team.
  template <class Body>
  void together(Body&& body) {
    if (team_ == nullptr) return body(all(), outputs_);
    const int64_t pieces = w_.pieces(), piece = width_ / pieces, size = team_->size();
    team_->run([&](int i) { body(Span{pieces * i / size * piece, pieces * (i + 1) / size * piece}, products_[i]); });
  }

  /// out = norm3(z2)
  void finish(Span channels, Slot& slot, T* out) {
    GroupNorm<T>& norm = *slot.norm[2];
    const T* z = slot.z[1];
    norm.prepare(z, channels.begin, channels.end - channels.begin);
    for (int64_t p = 0; p < shape_.pixels(); ++p)
      each<T>(channels, [&](int64_t c) { store(out + p * width_ + c, norm.apply(load(z + p * width_ + c), c)); });
  }

  /// relu(norm(input of layer l)) in the Winograd domain, as map `map` of `maps`.
  void transform_activations(Span channels, const Slot& slot, int l, int maps, int map) {
    const T* x = slot.input(l);
    const GroupNorm<T>& norm = *slot.norm[l];
    framed_.set(channels, [&](int64_t p, int64_t c) { return relu(norm.apply(load(x + p * width_ + c), c)); });
    framed_.transform(channels, maps * shape_.tiles(), map * shape_.tiles(), inputs_);
  }

  static NODESHAPE_INLINE Vec<T> relu(Vec<T> x) { return Vec<T>{} > x ? Vec<T>{} : x; }  // keeps NaN

  /// dx of a norm at x whose output has the cotangent g; dx may be g.
  void pull(GroupNorm<T>& norm, const T* x, const T* g, T* dx) {
    norm.prepare_pull(x, g);
    for (int64_t p = 0; p < shape_.pixels(); ++p)
      each<T>(width_, [&](int64_t c) {
        const int64_t i = p * width_ + c;
        store(dx + i, norm.pull(load(x + i), load(g + i), c));
      });
  }

  /// border_sums_ = sums of dz over the pixels of each border class.
  void sum_borders(const T* dz) {
    __builtin_memset(border_sums_, 0, kBorderClasses * width_ * sizeof(T));
    const int64_t width = shape_.width;
    for (int64_t y = 0; y < shape_.height; ++y)
      each<T>(width_, [&](int64_t c) {
        const auto at = [&](int64_t x) { return load(dz + (y * width + x) * width_ + c); };
        const auto add = [&](int64_t x, Vec<T> sum) {
          T* border = border_sums_ + border_class(y, x, shape_.height, width) * width_ + c;
          store(border, load(border) + sum);
        };
        add(0, at(0));
        if (width == 1) return;
        Vec<T> middle{};
        for (int64_t x = 1; x + 1 < width; ++x) middle += at(x);
        if (width > 2) add(1, middle);
        add(width - 1, at(width - 1));
      });
  }

  const Weights& w_;
  const MapShape shape_;
  const int64_t width_;  // padded channels
  FramedMap<T> framed_;  // scratch: the map being transformed
  T* inputs_;            // [36, rows, padded channels], transformed inputs
  T* outputs_;           // [36, rows, panel], products; [36, rows, padded channels], transformed cotangents
  Slot slots_[kMaxGroup];
  double time_product_ = 0;
  Team* team_ = nullptr;
  T* products_[Team::kMost];  // as outputs_, of each piece that a team works on
  T* shift_[2];               // [border classes, padded channels], bias + t time
  T* border_sums_ = nullptr;
  T* norm_gradient_ = nullptr;  // [3, (gamma, beta), padded channels]
  FilterGradient<T>* filter_gradient_[2];
  T* bias_gradient_[2];  // [padded channels]
  T* time_gradient_[2];  // [border classes, padded channels]
};

}  // namespace nodeshape::NODESHAPE_TARGET
