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

  int64_t parameters() const { return model.numbers(); }
  int64_t group() const { return 1; }
  double cost() const { return 2.0 * double(parameters()); }

  /// Whether tiles are worth it for a batch of one too, most of whose lanes are idle; a solve may not depend on its
  /// batch.
  bool suits(double theta) const { return theta == 0.0 && parameters() <= 1024; }
};

template <class T, Activation A>
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
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      const T* from = tensor + smaller(lane, members - 1) * sample();
      for (int64_t i = 0; i < sample(); ++i) y[i * kWidth + lane] = from[i];
    }
  }
  void read_cotangent(const T* tensor, int members, T* lambda) const {
    read(tensor, members, lambda);
    for (int64_t i = 0; i < sample(); ++i)
      for (int64_t lane = members; lane < kWidth; ++lane) lambda[i * kWidth + lane] = 0;
  }
  void write(const T* y, int members, T* tensor) const {
    for (int64_t lane = 0; lane < members; ++lane)
      for (int64_t i = 0; i < sample(); ++i) tensor[lane * sample() + i] = y[i * kWidth + lane];
  }
  void pack(const T* y, int members, T* row) const { write(y, members, row); }
  void unpack(const T* row, int members, T* y) const { read(row, members, y); }
  void keep(int, const T* y, int members, T* row) const { pack(y, members, row); }
  void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }

  void eval(double t, const Batch<T>& batch) {
    const Vec<T> time = splat(T(t));
    for (int i = 0; i < batch.count; ++i) {
      Slot& slot = slots_[batch.slot[i]];
      slot.y = batch.in[i];
      for (int64_t l = 0; l < count_; ++l) {
        const T *a = slot.input(l), *weight = w_.weight(l), *bias = w_.bias(l);
        const int64_t in = w_.model.in(l), columns = w_.model.columns(l);
        T *z = l + 1 < count_ ? slot.layers[l].z : batch.out[i], *activated = slot.layers[l].a;
        units(w_.out(l), [&]<int N>(int64_t o) {
          Vec<T> sum[N];
          for (int n = 0; n < N; ++n) {
            sum[n] = splat(bias[o + n]);
            if (l == 0) sum[n] = fma(time, splat(weight[(o + n) * columns + in]), sum[n]);
          }
          for (int64_t k = 0; k < in; ++k) {
            const Vec<T> x = load(a + k * kWidth);
            for (int n = 0; n < N; ++n) sum[n] = fma(splat(weight[(o + n) * columns + k]), x, sum[n]);
          }
          for (int n = 0; n < N; ++n) {
            if (z != nullptr) store(z + (o + n) * kWidth, sum[n]);
            if (activated != nullptr) store(activated + (o + n) * kWidth, activate<A>(sum[n]));
          }
        });
      }
    }
  }

  void vjp(const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) {
      Slot& slot = slots_[batch.slot[i]];
      __builtin_memcpy(slot.layers[count_ - 1].dz, batch.in[i], size() * sizeof(T));
      for (int64_t l = count_ - 1; l >= 0; --l) {
        const T *dz = slot.layers[l].dz, *weight = w_.weight(l);
        const int64_t out = w_.out(l), columns = w_.model.columns(l);
        T* to = l == 0 ? batch.out[i] : slot.layers[l - 1].dz;
        units(w_.model.in(l), [&]<int N>(int64_t k) {
          Vec<T> sum[N] = {};
          for (int64_t o = 0; o < out; ++o) {
            const Vec<T> d = load(dz + o * kWidth);
            for (int n = 0; n < N; ++n) sum[n] = fma(splat(weight[o * columns + k + n]), d, sum[n]);
          }
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

  void accumulate(double t, double h, int count) {
    const Vec<T> scale = splat(T(h)), time = splat(T(t));
    Vec<T> product{};
    for (int s = 0; s < count; ++s) {
      const Slot& slot = slots_[s];
      T* gradient = gradient_;
      const auto add = [&](Vec<T> x) {
        store(gradient, load(gradient) + x);
        gradient += kWidth;
      };
      for (int64_t l = 0; l < count_; ++l) {
        const T *a = slot.input(l), *dz = slot.layers[l].dz;
        const int64_t in = w_.model.in(l), out = w_.out(l);
        for (int64_t o = 0; o < out; ++o) {
          const Vec<T> d = load(dz + o * kWidth) * scale;
          for (int64_t k = 0; k < in; ++k) {
            store(gradient, fma(d, load(a + k * kWidth), load(gradient)));
            gradient += kWidth;
          }
          if (l > 0) continue;
          add(d * time);
          product = fma(d, splat(w_.weight(0)[o * (in + 1) + in]), product);
        }
        for (int64_t o = 0; o < out; ++o) add(load(dz + o * kWidth) * scale);
      }
    }
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

  /// Calls body.operator()<N>(first) for blocks of N units: four sums at a time hide the latency of an addition.
  template <class Body>
  static NODESHAPE_INLINE void units(int64_t count, Body&& body) {
    int64_t first = 0;
    for (; first + 4 <= count; first += 4) body.template operator()<4>(first);
    for (; first + 2 <= count; first += 2) body.template operator()<2>(first);
    for (; first < count; ++first) body.template operator()<1>(first);
  }

  const Weights& w_;
  const int64_t count_;
  Slot* slots_;
  T* gradient_;  // [parameters, lanes], in their order
  double time_product_ = 0;
};

}  // namespace nodeshape::NODESHAPE_TARGET
