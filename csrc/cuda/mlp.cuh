// MLPDynamics of one sample, carried by one team: z_l = W_l a_{l-1} + b_l, a_l = activation(z_l), with a_0 = [y, t]
// and f = z_L. Units lie along the threads.
#pragma once

#include "arena.cuh"
#include "../activation.h"
#include "../stage.h"

namespace nodeshape::cuda {

template <class T>
class MlpDynamics;

/// Weights as the kernels read them, in global memory.
template <class T>
struct MlpWeights {
  using Dynamics = MlpDynamics<T>;
  struct Layer {
    int64_t in, out;     // without time
    int64_t columns;     // of `weight`: in, and one for the time in layer 0
    int64_t units;       // of all layers below
    int64_t parameters;  // of all layers below
    const T* weight;     // [out, columns]
    const T* forward;    // [in, out], its transpose without time
    const T* bias;       // [out]
  };
  int64_t dim, count, units, parameters;
  Activation activation;
  const Layer* layers;  // [count]

  NODESHAPE_FUNCTION int64_t gradient_elements() const { return parameters; }
};

template <class T>
class MlpDynamics {
 public:
  using Scalar = T;
  using Weights = MlpWeights<T>;
  static constexpr int kSamples = 1;

  NODESHAPE_FUNCTION MlpDynamics(const Weights& weights, Arena& arena, T*, bool with_gradient)
      : w_(weights), z_(arena.take<T>(w_.units)), a_(arena.take<T>(w_.units)) {
    if (!with_gradient) return;
    dz_ = arena.take<T>(w_.units);
    gradient_ = arena.zeros<T>(w_.parameters);
  }

  NODESHAPE_FUNCTION int64_t size() const { return w_.dim; }
  NODESHAPE_FUNCTION int64_t sample() const { return w_.dim; }
  NODESHAPE_FUNCTION int64_t kept() const { return w_.dim; }

  NODESHAPE_FUNCTION void read(const T* tensor, int, T* y) const { copy(tensor, y); }
  NODESHAPE_FUNCTION void read_cotangent(const T* tensor, int, T* lambda) const { copy(tensor, lambda); }
  NODESHAPE_FUNCTION void write(const T* y, int, T* tensor) const { copy(y, tensor); }
  NODESHAPE_FUNCTION void pack(const T* y, int, T* row) const { copy(y, row); }
  NODESHAPE_FUNCTION void unpack(const T* row, int, T* y) const { copy(row, y); }
  NODESHAPE_FUNCTION void keep(int, const T* y, int, T* row) const { copy(y, row); }
  NODESHAPE_FUNCTION void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }

  NODESHAPE_FUNCTION void eval(double t, const Batch<T>& batch) {
    y_ = batch.in[0];
    for (int64_t l = 0; l < w_.count; ++l) {
      const Layer layer = w_.layers[l];
      const T *below = input(l), time = T(t);
      const bool last = l + 1 == w_.count;
      T *z = last ? batch.out[0] : z_ + layer.units, *a = a_ + layer.units;
      sum_columns<T>(
          layer.in, layer.out, [=](int64_t k, int64_t o) { return layer.forward[k * layer.out + o] * below[k]; },
          [=, this](int64_t o, T sum) {
            sum += layer.bias[o];
            if (l == 0) sum = fma(time, layer.weight[o * layer.columns + layer.in], sum);
            z[o] = sum;
            if (!last) a[o] = activated(sum);
          });
    }
  }

  NODESHAPE_FUNCTION void vjp(const Batch<T>& batch) {
    cotangent_ = batch.in[0];
    for (int64_t l = w_.count - 1; l >= 0; --l) {
      const Layer layer = w_.layers[l];
      const T* above = cotangent(l);
      const int64_t units = l > 0 ? w_.layers[l - 1].units : 0;
      T *to = l > 0 ? dz_ + units : batch.out[0], *z = z_ + units, *a = a_ + units;
      sum_columns<T>(
          layer.out, layer.in, [=](int64_t o, int64_t k) { return layer.weight[o * layer.columns + k] * above[o]; },
          [=, this](int64_t k, T sum) { to[k] = l > 0 ? sum * slope(z[k], a[k]) : sum; });
    }
  }

  NODESHAPE_FUNCTION void accumulate(double t, double h, int) {
    const T scale = T(h), time = T(t);
    for (int64_t l = 0; l < w_.count; ++l) {
      const Layer layer = w_.layers[l];
      const T *above = cotangent(l), *below = input(l);
      T *to_weight = gradient_ + layer.parameters, *to_bias = to_weight + layer.out * layer.columns;
      spread(layer.out * layer.columns, [=](int64_t i) {
        const int64_t o = i / layer.columns, k = i % layer.columns;
        to_weight[i] = fma(scale * above[o], k < layer.in ? below[k] : time, to_weight[i]);
      });
      spread(layer.out, [=](int64_t o) { to_bias[o] = fma(scale, above[o], to_bias[o]); });
    }
    const Layer layer = w_.layers[0];
    const T* above = cotangent(0);
    time_product_ =
        h *
        double(total<T>(layer.out, [=](int64_t o) { return above[o] * layer.weight[o * layer.columns + layer.in]; }));
  }

  NODESHAPE_FUNCTION double time_product() const { return time_product_; }

  /// Hand over what accumulate() gathered, in the order of the parameters.
  NODESHAPE_FUNCTION void take_gradient(T* row) {
    const T* gradient = gradient_;
    spread(w_.parameters, [=](int64_t i) { row[i] = gradient[i]; });
  }

 private:
  using Layer = typename Weights::Layer;

  NODESHAPE_FUNCTION const T* input(int64_t l) const { return l == 0 ? y_ : a_ + w_.layers[l - 1].units; }
  NODESHAPE_FUNCTION const T* cotangent(int64_t l) const {
    return l + 1 == w_.count ? cotangent_ : dz_ + w_.layers[l].units;
  }

  NODESHAPE_FUNCTION void copy(const T* from, T* to) const {
    each<T>(w_.dim, [=](int64_t i) { to[i] = from[i]; });
  }

  NODESHAPE_INLINE T activated(T z) const {
    switch (w_.activation) {
      case Activation::tanh:
        return activate<Activation::tanh>(z);
      case Activation::relu:
        return activate<Activation::relu>(z);
      case Activation::softplus:
        return activate<Activation::softplus>(z);
      default:
        return activate<Activation::silu>(z);
    }
  }
  NODESHAPE_INLINE T slope(T z, T a) const {
    switch (w_.activation) {
      case Activation::tanh:
        return slope_of<Activation::tanh>(z, a);
      case Activation::relu:
        return slope_of<Activation::relu>(z, a);
      case Activation::softplus:
        return slope_of<Activation::softplus>(z, a);
      default:
        return slope_of<Activation::silu>(z, a);
    }
  }

  const Weights& w_;
  const T *y_ = nullptr, *cotangent_ = nullptr;
  T *z_, *a_;        // [units], of the last layer unused
  T* dz_ = nullptr;  // [units], likewise
  T* gradient_ = nullptr;
  double time_product_ = 0;
};

}  // namespace nodeshape::cuda
