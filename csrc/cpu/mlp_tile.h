// MLPDynamics of a few parameters by explicit steps: kLanes samples side by side along the vector.
//
// Units along the vector, as in mlp.h, would leave most of its lanes to padding. Explicit steps need no decision that
// differs between samples, so that a tile of them goes through time as one.
#pragma once

#include "arena.h"
#include "share.h"
#include "../activation.h"
#include "../stage.h"

namespace nodeshape::NODESHAPE_TARGET {

/// The tensors themselves: every weight is used one at a time, for all samples of a tile.
template <class T>
struct MlpTileWeights {
  const MlpModel& model;

  int64_t out(int64_t l) const { return model.widths[l]; }
  const T* weight(int64_t l) const { return static_cast<const T*>(model.parameters[2 * l]); }
  const T* bias(int64_t l) const { return static_cast<const T*>(model.parameters[2 * l + 1]); }

  int64_t parameters() const { return model.parameter_count(); }
  int64_t group() const { return 4; }
  double cost() const { return 2.0 * double(parameters()); }

  /// Whether tiles are worth it for a batch of one too, most of whose lanes are idle; a solve may not depend on its
  /// batch.
  bool suits(double theta) const { return theta == 0.0 && parameters() <= 1024; }
};

template <class T>
class MlpTile {
  static constexpr int64_t kWidth = kLanes<T>;

 public:
  using Scalar = T;
  using Weights = MlpTileWeights<T>;
  static constexpr int kSamples = int(kWidth);

  MlpTile(const Weights& weights, Arena& arena, int group, bool with_gradient) : w_(weights), count_(w_.model.layers) {
    slots_ = arena.take<Slot>(group);
    for (int s = 0; s < group; ++s) {
      slots_[s].layers = arena.take<Layer>(count_);
      for (int64_t l = 0; l < count_; ++l) {
        Layer& layer = slots_[s].layers[l];
        layer.z = with_gradient && l + 1 < count_ ? arena.take<T>(w_.out(l) * kWidth) : nullptr;
        layer.a = l + 1 < count_ ? arena.take<T>(w_.out(l) * kWidth) : nullptr;
        layer.dz = with_gradient ? arena.take<T>(w_.out(l) * kWidth) : nullptr;
      }
    }
    gradient_ = with_gradient ? arena.zeros<T>(w_.parameters() * kWidth) : nullptr;
  }

  int64_t size() const { return w_.model.dim * kWidth; }
  int64_t sample() const { return w_.model.dim; }
  int64_t kept() const { return sample(); }

  /// Lanes beyond the members repeat the last one, and so cannot be worse than it.
  void read(const T* tensor, int members, T* y) const {
    for (int64_t i = 0; i < sample(); ++i) {
      T* to = y + i * kWidth;
      for (int64_t lane = 0; lane < members; ++lane) to[lane] = tensor[lane * sample() + i];
      for (int64_t lane = members; lane < kWidth; ++lane) to[lane] = to[members - 1];
    }
  }
  void read_cotangent(const T* tensor, int members, T* lambda) const {
    read(tensor, members, lambda);
    for (int64_t i = 0; i < sample(); ++i)
      for (int64_t lane = members; lane < kWidth; ++lane) lambda[i * kWidth + lane] = 0;
  }
  void write(const T* y, int members, T* tensor) const {
    for (int64_t i = 0; i < sample(); ++i)
      for (int64_t lane = 0; lane < members; ++lane) tensor[lane * sample() + i] = y[i * kWidth + lane];
  }
  /// Of a checkpoint, which the backward sweep reads with other dynamics.
  void pack(const T* y, int members, T* row) const { write(y, members, row); }
  /// Of a stage: a full slot as it is.
  void keep(int, const T* y, int members, T* row) const {
    if (members < kWidth) return write(y, members, row);
    each<T>(size(), [=](int64_t i) { store(row + i, load(y + i)); });
  }
  void unpack(const T* row, int members, T* y) const {
    if (members < kWidth) return read(row, members, y);
    each<T>(size(), [=](int64_t i) { store(y + i, load(row + i)); });
  }
  void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }

  void eval(double t, const Batch<T>& batch) {
    with_activation(w_.model.activation, [&]<Activation A>() { eval_with<A>(t, batch); });
  }
  void vjp(const Batch<T>& batch) {
    with_activation(w_.model.activation, [&]<Activation A>() { vjp_with<A>(batch); });
  }

  void accumulate(double t, double h, int count) {
    const Vec<T> scale = splat(T(h)), time = splat(T(t));
    Vec<T> product{};
    int first = 0;
    for (; first + 2 <= count; first += 2) product += accumulate_slots<2>(slots_ + first, scale, time);
    if (first < count) product += accumulate_slots<1>(slots_ + first, scale, time);
    time_product_ = double(sum<T>(product));
  }

  double time_product() const { return time_product_; }

  /// Hand over what accumulate() gathered, in the order of the parameters, and start again from zero.
  void take_gradient(T* row) {
    const int64_t parameters = w_.parameters();
    for (int64_t i = 0; i < parameters; ++i) row[i] = sum<T>(load(gradient_ + i * kWidth));
    __builtin_memset(gradient_, 0, parameters * kWidth * sizeof(T));
  }

 private:
  struct Layer {
    T *z, *a, *dz;  // [units, lanes]; z and dz for the gradient only; of the last layer only dz is used
  };
  struct Slot {
    const T* y;
    Layer* layers;

    const T* input(int64_t l) const { return l == 0 ? y : layers[l - 1].a; }
  };

  /// Slots one after the other within each layer, so that one's arithmetic hides the latency of another's.
  template <Activation A>
  NODESHAPE_OUTLINE void eval_with(double t, const Batch<T>& batch) {
    const Vec<T> time = splat(T(t));
    for (int i = 0; i < batch.count; ++i) slots_[batch.slot[i]].y = batch.in[i];
    for (int64_t l = 0; l < count_; ++l) {
      const T *weight = w_.weight(l), *bias = w_.bias(l);
      const int64_t in = w_.model.in(l), columns = w_.model.columns(l);
      for (int i = 0; i < batch.count; ++i) {
        const Slot& slot = slots_[batch.slot[i]];
        const T* a = slot.input(l);
        T *z = l + 1 < count_ ? slot.layers[l].z : batch.out[i], *activated = slot.layers[l].a;
        units(w_.out(l), [&]<int N>(int64_t o) {
          Vec<T> sum[N];
          for (int n = 0; n < N; ++n) {
            sum[n] = splat(bias[o + n]);
            if (l == 0) sum[n] = fma(time, splat(weight[(o + n) * columns + in]), sum[n]);
          }
          products<N>(in, sum, [&](int64_t k, int n) { return splat(weight[(o + n) * columns + k]); }, a);
          for (int n = 0; n < N; ++n) {
            if (z != nullptr) store(z + (o + n) * kWidth, sum[n]);
            if (activated != nullptr) store(activated + (o + n) * kWidth, activate<A>(sum[n]));
          }
        });
      }
    }
  }

  template <Activation A>
  NODESHAPE_OUTLINE void vjp_with(const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i)
      __builtin_memcpy(slots_[batch.slot[i]].layers[count_ - 1].dz, batch.in[i], size() * sizeof(T));
    for (int64_t l = count_ - 1; l >= 0; --l) {
      const T* weight = w_.weight(l);
      const int64_t out = w_.out(l), columns = w_.model.columns(l);
      for (int i = 0; i < batch.count; ++i) {
        const Slot& slot = slots_[batch.slot[i]];
        T* to = l == 0 ? batch.out[i] : slot.layers[l - 1].dz;
        units(w_.model.in(l), [&]<int N>(int64_t k) {
          Vec<T> sum[N] = {};
          products<N>(
              out, sum, [&](int64_t o, int n) { return splat(weight[o * columns + k + n]); }, slot.layers[l].dz);
          for (int n = 0; n < N; ++n) {
            if (l > 0) {
              const Layer& below = slot.layers[l - 1];
              sum[n] *= slope_of<A>(load(below.z + (k + n) * kWidth), load(below.a + (k + n) * kWidth));
            }
            store(to + (k + n) * kWidth, sum[n]);
          }
        });
      }
    }
  }

  /// accumulate() for N slots, which share the reading and writing of each parameter's gradient; returns their part of
  /// the time product.
  template <int N>
  Vec<T> accumulate_slots(const Slot* slots, Vec<T> scale, Vec<T> time) {
    Vec<T> product{};
    T* gradient = gradient_;
    for (int64_t l = 0; l < count_; ++l) {
      const int64_t in = w_.model.in(l), out = w_.out(l), columns = w_.model.columns(l);
      T* bias = gradient + out * columns * kWidth;
      const T *a[N], *dz[N];
      for (int n = 0; n < N; ++n) {
        a[n] = slots[n].input(l);
        dz[n] = slots[n].layers[l].dz;
      }
      for (int64_t o = 0; o < out; ++o) {
        Vec<T> d[N], all{};
        for (int n = 0; n < N; ++n) {
          d[n] = load(dz[n] + o * kWidth) * scale;
          all += d[n];
        }
#pragma GCC unroll 4
        for (int64_t k = 0; k < in; ++k, gradient += kWidth) {
          Vec<T> total = load(gradient);
          for (int n = 0; n < N; ++n) total = fma(d[n], load(a[n] + k * kWidth), total);
          store(gradient, total);
        }
        if (l == 0) {
          store(gradient, fma(all, time, load(gradient)));
          gradient += kWidth;
          product = fma(all, splat(w_.weight(0)[o * columns + in]), product);
        }
        store(bias + o * kWidth, load(bias + o * kWidth) + all);
      }
      gradient = bias + out * kWidth;
    }
    return product;
  }

  /// Calls body.operator()<N>(first) for blocks of N units: four sums at a time hide the latency of an addition.
  template <class Body>
  static NODESHAPE_INLINE void units(int64_t count, Body&& body) {
    int64_t first = 0;
    for (; first + 4 <= count; first += 4) body.template operator()<4>(first);
    for (; first + 2 <= count; first += 2) body.template operator()<2>(first);
    for (; first < count; ++first) body.template operator()<1>(first);
  }

  /// sum[n] += the sum over k of weight(k, n) x[k]
  template <int N, class Weight>
  static NODESHAPE_INLINE void products(int64_t count, Vec<T>* sum, Weight&& weight, const T* x) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; ++k) {
      const Vec<T> factor = load(x + k * kWidth);
      for (int n = 0; n < N; ++n) sum[n] = fma(weight(k, n), factor, sum[n]);
    }
  }

  const Weights& w_;
  const int64_t count_;
  Slot* slots_;
  T* gradient_;  // [parameters, lanes], in their order
  double time_product_ = 0;
};

}  // namespace nodeshape::NODESHAPE_TARGET
