// MLPDynamics: z_l = W_l a_{l-1} + b_l, a_l = activation(z_l), with a_0 = [y, t] and f = z_L.
//
// A sample's units lie along the vector, padded with zeros; the samples of a group are the rows of each product.
#pragma once

#include "arena.h"
#include "gemm.h"
#include "../activation.h"
#include "../stage.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Weights as the kernels read them. Time's column of W_0 is kept apart: it only shifts the bias.
template <class T>
struct MlpWeights {
  struct Layer {
    int64_t in, out;    // without time
    const T* forward;   // [in, padded out], W transposed
    const T* backward;  // [out, padded in], W
    const T* bias;      // [padded out]
    const T* time;      // [padded out], layer 0 only
  };
  int64_t dim, count, parameter_count;
  Activation activation;
  Layer* layers;  // [count]

  MlpWeights(const MlpModel& model, Arena& arena)
      : dim(model.dim), count(model.layers), parameter_count(model.parameter_count()), activation(model.activation) {
    layers = arena.take<Layer>(count);
    for (int64_t l = 0; l < count; ++l) {
      const int64_t in = model.in(l), out = model.widths[l], columns = model.columns(l);
      const T* weight = static_cast<const T*>(model.parameters[2 * l]);
      T* forward = arena.zeros<T>(in * padded<T>(out));
      T* backward = arena.zeros<T>(out * padded<T>(in));
      T* bias = arena.zeros<T>(padded<T>(out));
      T* time = arena.zeros<T>(padded<T>(out));
      for (int64_t o = 0; o < out; ++o) {
        for (int64_t i = 0; i < in; ++i) {
          forward[i * padded<T>(out) + o] = weight[o * columns + i];
          backward[o * padded<T>(in) + i] = weight[o * columns + i];
        }
        bias[o] = static_cast<const T*>(model.parameters[2 * l + 1])[o];
        if (l == 0) time[o] = weight[o * columns + dim];
      }
      layers[l] = {in, out, forward, backward, bias, time};
    }
  }

  int64_t parameters() const { return parameter_count; }
  int64_t group() const { return kMaxGroup; }
  double cost() const { return 50 + 0.1 * double(parameters()); }
};

template <class T>
class MlpDynamics {
 public:
  using Scalar = T;
  using Weights = MlpWeights<T>;
  static constexpr int kSamples = 1;

  MlpDynamics(const Weights& weights, Arena& arena, int group, bool with_gradient) : w_(weights) {
    layers_ = arena.take<Layer>(w_.count);
    input_ = arena.take<T>(group * size());
    for (int64_t l = 0; l < w_.count; ++l) {
      const int64_t width = padded<T>(w_.layers[l].out);
      Layer& layer = layers_[l];
      layer.width = width;
      layer.shift = arena.take<T>(width);
      layer.z = arena.take<T>(group * width);
      layer.a = l + 1 < w_.count ? arena.take<T>(group * width) : nullptr;
      if (!with_gradient) continue;
      layer.dz = arena.take<T>(group * width);
      layer.weight_gradient = arena.zeros<T>(w_.layers[l].in * width);
      layer.bias_gradient = arena.zeros<T>(width);
    }
    if (!with_gradient) return;
    input_gradient_ = arena.take<T>(group * size());
    time_gradient_ = arena.zeros<T>(layers_[0].width);
  }

  int64_t size() const { return padded<T>(w_.dim); }
  int64_t sample() const { return w_.dim; }

  int64_t kept() const { return sample(); }

  void read(const T* tensor, int, T* y) const {
    each<T>(size(), [=](int64_t i) { store(y + i, splat(T(0))); });
    for (int64_t i = 0; i < w_.dim; ++i) y[i] = tensor[i];
  }
  void read_cotangent(const T* tensor, int members, T* lambda) const { read(tensor, members, lambda); }
  void write(const T* y, int, T* tensor) const {
    for (int64_t i = 0; i < w_.dim; ++i) tensor[i] = y[i];
  }
  void pack(const T* y, int members, T* row) const { write(y, members, row); }
  void unpack(const T* row, int members, T* y) const { read(row, members, y); }
  void keep(int, const T* y, int members, T* row) const { pack(y, members, row); }
  void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }

  NODESHAPE_OUTLINE void eval(double t, const Batch<T>& batch) {
    const Vec<T> time = splat(T(t));
    for (int64_t l = 0; l < w_.count; ++l) {
      T* shift = layers_[l].shift;
      const T *bias = w_.layers[l].bias, *slope = w_.layers[l].time;
      each<T>(layers_[l].width, [=](int64_t i) {
        store(shift + i, l == 0 ? fma(time, load(slope + i), load(bias + i)) : load(bias + i));
      });
    }
    for (int i = 0; i < batch.count; ++i) {
      const T* from = batch.in[i];
      T* to = input_ + batch.slot[i] * size();
      each<T>(size(), [=](int64_t k) { store(to + k, load(from + k)); });
    }
    each_run(batch, [&](int first, int rows) {
      const T* a = input_ + first * size();
      int64_t a_row = size();
      for (int64_t l = 0; l < w_.count; ++l) {
        const Layer& layer = layers_[l];
        T* z = layer.z + first * layer.width;
        for (int r = 0; r < rows; ++r)
          each<T>(layer.width, [=, &layer](int64_t i) { store(z + r * layer.width + i, load(layer.shift + i)); });
        gemm<T, true>(rows, layer.width, w_.layers[l].in, {a, a_row, 1}, w_.layers[l].forward, layer.width, z,
                      layer.width);
        if (l + 1 == w_.count) break;
        T* activated = layer.a + first * layer.width;
        with_activation(w_.activation, [&]<Activation A>() {
          each<T>(rows * layer.width, [=](int64_t i) { store(activated + i, activate<A>(load(z + i))); });
        });
        a = activated;
        a_row = layer.width;
      }
    });
    copy_out(batch, layers_[w_.count - 1].z);
  }

  NODESHAPE_OUTLINE void vjp(const Batch<T>& batch) {
    T* last = layers_[w_.count - 1].dz;
    for (int i = 0; i < batch.count; ++i) {
      const T* from = batch.in[i];
      T* to = last + batch.slot[i] * size();
      each<T>(size(), [=](int64_t k) { store(to + k, load(from + k)); });
    }
    each_run(batch, [&](int first, int rows) {
      for (int64_t l = w_.count - 1; l > 0; --l) {
        const Layer &layer = layers_[l], &below = layers_[l - 1];
        T* dz = below.dz + first * below.width;
        gemm<T, false>(rows, below.width, w_.layers[l].out, {layer.dz + first * layer.width, layer.width, 1},
                       w_.layers[l].backward, below.width, dz, below.width);
        const T *z = below.z + first * below.width, *a = below.a + first * below.width;
        with_activation(w_.activation, [&]<Activation A>() {
          each<T>(rows * below.width,
                  [=](int64_t i) { store(dz + i, load(dz + i) * slope_of<A>(load(z + i), load(a + i))); });
        });
      }
      const Layer& bottom = layers_[0];
      gemm<T, false>(rows, size(), w_.layers[0].out, {bottom.dz + first * bottom.width, bottom.width, 1},
                     w_.layers[0].backward, size(), input_gradient_ + first * size(), size());
    });
    copy_out(batch, input_gradient_);
  }

  NODESHAPE_OUTLINE void accumulate(double t, double h, int count) {
    const Vec<T> scale = splat(T(h)), time = splat(T(t));
    for (int64_t l = 0; l < w_.count; ++l) {
      const Layer& layer = layers_[l];
      const int64_t width = layer.width;
      T *dz = layer.dz, *bias_gradient = layer.bias_gradient;
      // Multiplies dz by h and adds it up over the samples.
      const auto scaled_sum = [=](int64_t i) {
        Vec<T> sum{};
        for (int s = 0; s < count; ++s) {
          const Vec<T> d = load(dz + s * width + i) * scale;
          store(dz + s * width + i, d);
          sum += d;
        }
        store(bias_gradient + i, load(bias_gradient + i) + sum);
        return sum;
      };
      if (l == 0) {
        T* time_gradient = time_gradient_;
        const T* slope = w_.layers[0].time;
        time_product_ = double(total<T>(width, [=](int64_t i) {
          const Vec<T> sum = scaled_sum(i);
          store(time_gradient + i, fma(time, sum, load(time_gradient + i)));
          return sum * load(slope + i);
        }));
      } else {
        each<T>(width, scaled_sum);
      }
      const T* a = l == 0 ? input_ : layers_[l - 1].a;
      gemm<T, true>(w_.layers[l].in, width, count, {a, 1, l == 0 ? size() : layers_[l - 1].width}, dz, width,
                    layer.weight_gradient, width);
    }
  }

  double time_product() const { return time_product_; }

  /// Hand over what accumulate() gathered, in the order of the parameters, and start again from zero.
  void take_gradient(T* row) {
    for (int64_t l = 0; l < w_.count; ++l) {
      const Layer& layer = layers_[l];
      const int64_t in = w_.layers[l].in, out = w_.layers[l].out;
      for (int64_t o = 0; o < out; ++o) {
        for (int64_t i = 0; i < in; ++i) *row++ = layer.weight_gradient[i * layer.width + o];
        if (l == 0) *row++ = time_gradient_[o];
      }
      for (int64_t o = 0; o < out; ++o) *row++ = layer.bias_gradient[o];
      __builtin_memset(layer.weight_gradient, 0, in * layer.width * sizeof(T));
      __builtin_memset(layer.bias_gradient, 0, layer.width * sizeof(T));
    }
    __builtin_memset(time_gradient_, 0, layers_[0].width * sizeof(T));
  }

 private:
  struct Layer {
    int64_t width;       // of a row: the layer's outputs, padded
    T* shift;            // [width], bias and the part of time
    T* z;                // [group, width]
    T* a;                // [group, width]
    T* dz;               // [group, width]
    T* weight_gradient;  // [in, width]
    T* bias_gradient;    // [width]
  };

  /// Calls body(first, rows) for each run of neighbouring slots.
  template <class Body>
  void each_run(const Batch<T>& batch, Body&& body) {
    for (int i = 0; i < batch.count;) {
      int rows = 1;
      while (i + rows < batch.count && batch.slot[i + rows] == batch.slot[i] + rows) ++rows;
      body(batch.slot[i], rows);
      i += rows;
    }
  }

  void copy_out(const Batch<T>& batch, const T* rows) {
    for (int i = 0; i < batch.count; ++i) {
      const T* from = rows + batch.slot[i] * size();
      T* to = batch.out[i];
      each<T>(size(), [=](int64_t k) { store(to + k, load(from + k)); });
    }
  }

  const Weights& w_;
  Layer* layers_;
  T* input_;                     // [group, size]
  T* input_gradient_ = nullptr;  // [group, size]
  T* time_gradient_ = nullptr;   // [width of layer 0]
  double time_product_ = 0;
};

}  // namespace nodeshape::NODESHAPE_TARGET
