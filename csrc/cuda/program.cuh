// A program as the dynamics of one sample, carried by one team. A layer is a loop over elements that the threads share:
// its outputs forwards, its inputs backwards, those of its weights for their gradient. Each element is one thread's, or
// is added up in an order that depends on the program alone.
#pragma once

#include "arena.cuh"
#include "../functions.h"
#include "../program.h"
#include "../stage.h"

namespace nodeshape::cuda {

/// Where an operand of a layer lies, and its cotangent; or the gradient of a weight.
struct Spot {
  enum Base : int { tape, state, result, weight, nothing } base;
  int number;      // of a weight
  int value;       // from the base on
  int cotangent;   // likewise
  int from, size;  // where the operand begins in its buffer, and the buffer's size
};

/// Elements of a, b and out that belong together.
struct Place {
  int a, b, out;
};

/// How the elements that strides choose are shared out by those of one operand, the targets: each meets `repeats`
/// others.
struct Walk {
  int targets, repeats;
  int outer, dims;  // the first `outer` dimensions tell targets apart, the others repeats
  int sizes[kMostDims], a[kMostDims], b[kMostDims], out[kMostDims];

  NODESHAPE_INLINE Place target(int64_t i) const { return place(0, outer, int(i)); }
  NODESHAPE_INLINE Place repeat(int64_t i) const { return place(outer, dims, int(i)); }

 private:
  NODESHAPE_INLINE Place place(int first, int end, int i) const {
    Place at{0, 0, 0};
    for (int d = end - 1; d >= first; --d) {
      const int above = d > first ? i / sizes[d] : 0, index = i - above * sizes[d];
      at.a += index * a[d];
      at.b += index * b[d];
      at.out += index * out[d];
      i = above;
    }
    return at;
  }
};

/// A convolution of stride 1 of maps that have their frame; forwards, or backwards from the outputs' cotangents.
struct Convolution {
  int groups, in, out;  // channels of a group
  int padded_out;       // of the weights, [groups, in, kernel height, kernel width, padded out]
  int height, width;    // of the result
  int kernel_height, kernel_width, dilation_height, dilation_width;
  int framed_height, framed_width;

  NODESHAPE_INLINE int pixels() const { return height * width; }
  NODESHAPE_INLINE int taps() const { return kernel_height * kernel_width; }
  NODESHAPE_INLINE int map() const { return framed_height * framed_width; }
  NODESHAPE_INLINE int64_t weights() const { return int64_t(groups) * in * taps() * padded_out; }
};

/// A layer as the kernels read it.
template <class T>
struct DeviceLayer {
  LayerKind kind;
  int64_t function;
  bool live, zero_a, add_a, zero_b, add_b;
  Spot a, b, out, scratch, weight, bias;
  double c[kLayerConstants];
  const T *forward, *backward;  // weights laid out for either pass, if there are any
  T* fresh[2];                  // those of them that prepare_program() writes, forward and backward, or null
  union {
    struct {
      int positions, in, out;
      bool outputs_first;  // the weight is [out, in]
    } linear;
    int count;  // unary
    struct {
      Walk by_out, by_a, by_b;
    } strided;  // binary, move, matmul
    struct {
      int groups, size, inner, count;
    } norm;
    struct {
      Convolution forward, backward;
      int height, width;        // of the input
      int top, side;            // of its frame
      int back_top, back_side;  // of the frame of the outputs' cotangents
    } conv;
  };
};

template <class T>
class ProgramDynamics;

template <class T>
struct ProgramWeights {
  using Dynamics = ProgramDynamics<T>;
  // What the host measures with:
  int64_t state, parameters;
  int64_t tapes;     // linearisations that are kept side by side
  int64_t elements;  // of a tape
  int64_t cotangents, scratch, sums;
  int64_t layer_count;
  int time, time_cotangent;  // places
  bool uses_time, zero_state;
  // In global memory:
  const DeviceLayer<T>* layers;
  const T* const* weights;

  NODESHAPE_FUNCTION int64_t gradient_elements() const { return parameters; }
};

template <class T>
class ProgramDynamics {
  using Layer = DeviceLayer<T>;

 public:
  using Scalar = T;
  using Weights = ProgramWeights<T>;
  static constexpr int kSamples = 1;

  /// `gradient` is [parameters], in global memory, or null.
  NODESHAPE_FUNCTION ProgramDynamics(const Weights& weights, Arena& arena, T* gradient, bool with_gradient)
      : w_(weights) {
    constexpr int64_t kFewParameters = 4096;  // which are added to in every stage, and so are better near
    const int64_t tapes = with_gradient ? w_.tapes : 1;
    if (with_gradient) {
      cotangents_ = arena.take<T>(w_.cotangents);
      scratch_ = arena.take<T>(w_.scratch);
      sums_ = arena.take<T>(w_.sums);
      own_gradient_ = w_.parameters <= kFewParameters;
      gradient_ = own_gradient_ ? arena.zeros<T>(w_.parameters) : gradient;
    }
    for (int64_t k = 0; k < tapes; ++k) tapes_[k] = {nullptr, nullptr, arena.take<T>(w_.elements)};
    if (!with_gradient) return;
    scaled_ = arena.take<T>(w_.state);
    ignored_ = arena.take<T>(w_.state);
  }

  NODESHAPE_FUNCTION int64_t size() const { return w_.state; }
  NODESHAPE_FUNCTION int64_t sample() const { return w_.state; }
  NODESHAPE_FUNCTION int64_t kept() const { return w_.state; }

  NODESHAPE_FUNCTION void read(const T* tensor, int, T* y) const { copy(tensor, y); }
  NODESHAPE_FUNCTION void read_cotangent(const T* tensor, int, T* lambda) const { copy(tensor, lambda); }
  NODESHAPE_FUNCTION void write(const T* y, int, T* tensor) const { copy(y, tensor); }
  NODESHAPE_FUNCTION void pack(const T* y, int, T* row) const { copy(y, row); }
  NODESHAPE_FUNCTION void unpack(const T* row, int, T* y) const { copy(row, y); }
  NODESHAPE_FUNCTION void keep(int, const T* y, int, T* row) const { copy(y, row); }
  NODESHAPE_FUNCTION void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }

  NODESHAPE_FUNCTION void record(int stage) { now_ = stage; }

  NODESHAPE_FUNCTION void eval(double t, const Batch<T>& batch) { run(t, batch.in[0], batch.out[0]); }
  NODESHAPE_FUNCTION void vjp(const Batch<T>& batch) {
    cotangent_ = batch.in[0];
    pull(batch.in[0], batch.out[0], false);
  }
  NODESHAPE_FUNCTION void pull(const Batch<T>& batch) { pull(batch.in[0], batch.out[0], true); }
  NODESHAPE_FUNCTION double pulled_time() const { return w_.uses_time ? double(cotangents_[w_.time_cotangent]) : 0.0; }

  NODESHAPE_FUNCTION void accumulate(double, double h, int) {
    const T* from = cotangent_;
    T* to = scaled_;
    const T scale = T(h);
    each<T>(w_.state, [=](int64_t i) { to[i] = scale * from[i]; });
    pull(to, ignored_, true);
  }
  NODESHAPE_FUNCTION double time_product() const { return pulled_time(); }

  /// Hand over what was gathered, in the order of the weights.
  NODESHAPE_FUNCTION void take_gradient(T* row) {
    if (!own_gradient_) return;  // it is there
    const T* gradient = gradient_;
    spread(w_.parameters, [=](int64_t i) { row[i] = gradient[i]; });
  }

 private:
  struct Tape {
    const T* in;
    T* out;
    T* memory;
  };

  NODESHAPE_FUNCTION void copy(const T* from, T* to) const {
    each<T>(w_.state, [=](int64_t i) { to[i] = from[i]; });
  }

  // ---- one evaluation, one vector-Jacobian product
  // -------------------------------------------------------------------

  NODESHAPE_FUNCTION NODESHAPE_CALL void run(double t, const T* in, T* out) {
    Tape& tape = tapes_[now_];
    tape.in = in;
    tape.out = out;
    T* time = tape.memory + w_.time;
    spread(1, [=](int64_t) { *time = T(t); });
    for (int64_t l = 0; l < w_.layer_count; ++l) forward(w_.layers[l]);
  }

  /// to = (df/dy)^T w; with `gradient`, dL/dp += (df/dp)^T w too.
  NODESHAPE_FUNCTION NODESHAPE_CALL void pull(const T* w, T* to, bool gradient) {
    above_ = w;
    below_ = to;
    gathers_ = gradient;
    if (w_.zero_state) clear(to, w_.state);
    for (int64_t l = w_.layer_count - 1; l >= 0; --l) {
      const Layer& layer = w_.layers[l];
      if (!layer.live) continue;
      if (layer.zero_a) clear(cotangent(layer.a) - layer.a.from, layer.a.size);
      if (layer.zero_b) clear(cotangent(layer.b) - layer.b.from, layer.b.size);
      backward(layer);
    }
  }

  NODESHAPE_FUNCTION void clear(T* x, int64_t count) const {
    spread(count, [=](int64_t i) { x[i] = 0; });
  }

  NODESHAPE_FUNCTION const T* value(const Spot& spot) const {
    const Tape& tape = tapes_[now_];
    switch (spot.base) {
      case Spot::state:
        return tape.in + spot.value;
      case Spot::result:
        return tape.out + spot.value;
      case Spot::tape:
        return tape.memory + spot.value;
      case Spot::weight:
        return w_.weights[spot.number] + spot.value;
      default:
        return nullptr;
    }
  }
  /// What a layer writes is no state and no weight.
  NODESHAPE_FUNCTION T* written(const Spot& spot) const {
    const Tape& tape = tapes_[now_];
    return (spot.base == Spot::result ? tape.out : tape.memory) + spot.value;
  }
  NODESHAPE_FUNCTION const T* output_cotangent(const Spot& out) const {
    return out.base == Spot::result ? above_ + out.cotangent : cotangents_ + out.cotangent;
  }
  /// Where the cotangent of an operand goes; null if nobody wants it.
  NODESHAPE_FUNCTION T* cotangent(const Spot& spot) const {
    switch (spot.base) {
      case Spot::state:
        return below_ + spot.cotangent;
      case Spot::tape:
        return cotangents_ + spot.cotangent;
      case Spot::weight:
        return gathers_ ? gradient_ + spot.cotangent : nullptr;
      default:
        return nullptr;
    }
  }

  NODESHAPE_FUNCTION void forward(const Layer& layer) {
    switch (layer.kind) {
      case LayerKind::linear:
        return linear(layer);
      case LayerKind::unary:
        return unary(layer);
      case LayerKind::binary:
      case LayerKind::move:
      case LayerKind::matmul:
        return strided(layer);
      case LayerKind::norm:
        return norm(layer);
      case LayerKind::conv:
        return conv(layer);
    }
  }
  NODESHAPE_FUNCTION void backward(const Layer& layer) {
    switch (layer.kind) {
      case LayerKind::linear:
        return linear_vjp(layer);
      case LayerKind::unary:
        return unary_vjp(layer);
      case LayerKind::binary:
      case LayerKind::move:
      case LayerKind::matmul:
        strided_vjp(layer, layer.strided.by_a, layer.a, layer.add_a, true);
        if (layer.kind != LayerKind::move) strided_vjp(layer, layer.strided.by_b, layer.b, layer.add_b, false);
        return;
      case LayerKind::norm:
        return norm_vjp(layer);
      case LayerKind::conv:
        return conv_vjp(layer);
    }
  }

  // ---- linear: out[o] = bias[o] + sum_i W[o, i] a[i], for each position
  // ----------------------------------------------

  NODESHAPE_FUNCTION NODESHAPE_CALL void linear(const Layer& layer) {
    const auto n = layer.linear;
    const T *weight = in_global(layer.forward), *bias = value(layer.bias), *in = value(layer.a);  // weight: [in, out]
    T* out = written(layer.out);
    add_up<T>(
        n.in, n.positions * n.out,
        [=](int64_t c) {
          const int p = int(c) / n.out;
          const T *w = weight + (int(c) - p * n.out), *x = in + p * n.in;
          return [=, width = n.out](int64_t i) { return w[i * width] * x[i]; };
        },
        [=](int64_t c, T sum) { out[c] = bias == nullptr ? sum : sum + bias[int(c) % n.out]; });
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void linear_vjp(const Layer& layer) {
    const auto n = layer.linear;
    const T *weight = in_global(layer.backward), *in = value(layer.a), *d = output_cotangent(layer.out);  // [out, in]
    T *to = cotangent(layer.a), *to_weight = cotangent(layer.weight), *to_bias = cotangent(layer.bias);
    const bool add = layer.add_a;
    add_up<T>(
        n.out, n.positions * n.in,
        [=](int64_t c) {
          const int p = int(c) / n.in;
          const T *w = weight + (int(c) - p * n.in), *x = d + p * n.out;
          return [=, width = n.in](int64_t o) { return w[o * width] * x[o]; };
        },
        [=](int64_t c, T sum) { to[c] = add ? to[c] + sum : sum; });
    if (to_weight != nullptr)
      add_up<T>(
          n.positions, int64_t(n.in) * n.out,
          [=](int64_t c) {
            const int columns = n.outputs_first ? n.in : n.out, r = int(c) / columns, k = int(c) - r * columns;
            const T *x = d + (n.outputs_first ? r : k), *y = in + (n.outputs_first ? k : r);
            return [=](int64_t p) { return x[p * n.out] * y[p * n.in]; };
          },
          [=](int64_t c, T sum) { to_weight[c] += sum; });
    if (to_bias != nullptr)
      add_up<T>(
          n.positions, n.out, [=](int64_t o) { return [=](int64_t p) { return d[p * n.out + o]; }; },
          [=](int64_t o, T sum) { to_bias[o] += sum; });
  }

  // ---- functions of one element
  // --------------------------------------------------------------------------------------

  static NODESHAPE_FUNCTION Constants<T> constants(const Layer& layer) {
    return {T(layer.c[0]), T(layer.c[1]), T(layer.c[2])};
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void unary(const Layer& layer) {
    const T* x = value(layer.a);
    T* out = written(layer.out);
    const Constants<T> k = constants(layer);
    const Unary function = Unary(layer.function);
    spread(layer.count, [=](int64_t i) { with_unary(function, [=]<Unary F>() { out[i] = apply<F, T>(x[i], k); }); });
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void unary_vjp(const Layer& layer) {
    const T *x = value(layer.a), *y = value(layer.out), *d = output_cotangent(layer.out);
    T* to = cotangent(layer.a);
    const Constants<T> k = constants(layer);
    const Unary function = Unary(layer.function);
    const bool add = layer.add_a;
    spread(layer.count, [=](int64_t i) {
      with_unary(function, [=]<Unary F>() { to[i] = fma(d[i], slope<F, T>(x[i], y[i], k), add ? to[i] : T(0)); });
    });
  }

  // ---- elements that strides choose: binary, move, matmul
  // ------------------------------------------------------------

  NODESHAPE_FUNCTION NODESHAPE_CALL void strided(const Layer& layer) {
    const Walk& walk = layer.strided.by_out;
    const T *a = value(layer.a), *b = layer.kind == LayerKind::move ? nullptr : value(layer.b);
    T* out = written(layer.out);
    const T scale = T(layer.c[0]);
    if (layer.kind == LayerKind::binary) {
      const Binary function = Binary(layer.function);
      return spread(walk.targets, [=, &walk](int64_t i) {
        const Place at = walk.target(i);
        with_binary(function, [=]<Binary F>() { out[at.out] = combine<F>(a[at.a], b[at.b]); });
      });
    }
    if (layer.kind == LayerKind::move && Move(layer.function) == Move::largest)
      return spread(walk.targets, [=, &walk](int64_t i) {
        const Place at = walk.target(i);
        T most = -T(__builtin_inf());
        for (int r = 0; r < walk.repeats; ++r)
          most = combine<Binary::maximum>(most, scale * a[at.a + walk.repeat(r).a]);
        out[at.out] = most;
      });
    add_up<T>(
        walk.repeats, walk.targets,
        [=, &walk](int64_t i) {
          const Place at = walk.target(i);
          return [=, &walk](int64_t r) {
            const Place more = walk.repeat(r);
            return (b == nullptr ? scale : b[at.b + more.b]) * a[at.a + more.a];
          };
        },
        [=, &walk](int64_t i, T sum) { out[walk.target(i).out] = sum; });
  }

  /// The cotangent of operand a, if `first`, or b, `to`, by whose elements the walk shares out.
  NODESHAPE_FUNCTION NODESHAPE_CALL void strided_vjp(const Layer& layer, const Walk& walk, const Spot& operand,
                                                     bool add, bool first) {
    T* to = cotangent(operand);
    if (to == nullptr) return;
    add = add || operand.base == Spot::weight;
    const T* d = output_cotangent(layer.out);
    const auto sink = [=, &walk](int64_t i, T sum) {
      const Place at = walk.target(i);
      T& place = to[first ? at.a : at.b];
      place = add ? place + sum : sum;
    };
    if (layer.kind == LayerKind::binary) {
      const T *a = value(layer.a), *b = value(layer.b);
      const Binary function = Binary(layer.function);
      return add_up<T>(
          walk.repeats, walk.targets,
          [=, &walk](int64_t i) {
            const Place at = walk.target(i);
            return [=, &walk](int64_t r) {
              const Place more = walk.repeat(r);
              const T w = d[at.out + more.out], x = a[at.a + more.a], y = b[at.b + more.b];
              T pulled = 0;
              with_binary(function,
                          [=, &pulled]<Binary F>() { pulled = first ? to_first<F>(w, x, y) : to_second<F>(w, x, y); });
              return pulled;
            };
          },
          sink);
    }
    const T* other = layer.kind == LayerKind::move ? nullptr : value(first ? layer.b : layer.a);
    const T scale = T(layer.c[0]);
    add_up<T>(
        walk.repeats, walk.targets,
        [=, &walk](int64_t i) {
          const Place at = walk.target(i);
          return [=, &walk](int64_t r) {
            const Place more = walk.repeat(r);
            const T factor = other == nullptr ? scale : other[first ? at.b + more.b : at.a + more.a];
            return factor * d[at.out + more.out];
          };
        },
        sink);
  }

  // ---- norm: (a - mean) / sqrt(variance + c0) of each group, then scale and shift
  // ------------------------------------

  /// sink(g, the sum of body(element) over group g); threads side by side take groups side by side, which begin to add
  /// up at different elements, in different banks of shared memory.
  template <class Body, class Sink>
  NODESHAPE_INLINE void sum_groups(int groups, int size, Body&& body, Sink&& sink) const {
    add_up<T>(
        size, groups,
        [=](int64_t g) {
          const int from = int(g) * size, turn = int(g) % size;
          return [=](int64_t r) {
            const int at = int(r) + turn;
            return body(from + (at < size ? at : at - size), int(g));
          };
        },
        sink);
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void norm(const Layer& layer) {
    const auto n = layer.norm;
    const T *in = value(layer.a), *weight = value(layer.weight), *bias = value(layer.bias);
    T *out = written(layer.out), *kept = written(layer.scratch);  // kept: [groups, (mean, 1 / deviation)]
    const T share = T(1) / T(n.size), eps = T(layer.c[0]);
    sum_groups(
        n.groups, n.size, [=](int e, int) { return in[e]; }, [=](int64_t g, T sum) { kept[2 * g] = sum * share; });
    sum_groups(
        n.groups, n.size,
        [=](int e, int g) {
          const T centred = in[e] - kept[2 * g];
          return centred * centred;
        },
        [=](int64_t g, T sum) { kept[2 * g + 1] = T(1) / root_of(sum * share + eps); });
    spread(n.groups * n.size, [=](int64_t e) {
      const int g = int(e) / n.size, c = int(e) / n.inner % n.count;
      const T inverse = kept[2 * g + 1], scale = weight == nullptr ? inverse : inverse * weight[c];
      out[e] = fma(in[e] - kept[2 * g], scale, bias == nullptr ? T(0) : bias[c]);
    });
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void norm_vjp(const Layer& layer) {
    const auto n = layer.norm;
    const T *in = value(layer.a), *weight = value(layer.weight), *kept = value(layer.scratch);
    const T* d = output_cotangent(layer.out);
    T *to = cotangent(layer.a), *to_weight = cotangent(layer.weight), *to_bias = cotangent(layer.bias);
    T *plain = sums_, *along = sums_ + n.groups;  // means of the scaled cotangent, and of it times the normalised value
    const bool add = layer.add_a;
    const T share = T(1) / T(n.size);
    const auto scaled = [=](int e) { return weight == nullptr ? d[e] : d[e] * weight[e / n.inner % n.count]; };
    const auto unit = [=](int e, int g) { return (in[e] - kept[2 * g]) * kept[2 * g + 1]; };
    sum_groups(
        n.groups, n.size, [=](int e, int) { return scaled(e); }, [=](int64_t g, T sum) { plain[g] = sum * share; });
    sum_groups(
        n.groups, n.size, [=](int e, int g) { return scaled(e) * unit(e, g); },
        [=](int64_t g, T sum) { along[g] = sum * share; });
    spread(n.groups * n.size, [=](int64_t i) {
      const int e = int(i), g = e / n.size;
      const T dz = kept[2 * g + 1] * (scaled(e) - plain[g] - unit(e, g) * along[g]);
      to[e] = add ? to[e] + dz : dz;
    });
    // Of scale and shift c: elements (k, c, j) for all k and j < inner.
    const int all = n.groups * n.size, rows = (all + n.inner * n.count - 1) / (n.inner * n.count) * n.inner;
    const auto element = [=](int64_t r, int64_t c) {
      const int k = int(r) / n.inner;
      return (k * n.count + int(c)) * n.inner + (int(r) - k * n.inner);
    };
    if (to_bias != nullptr)
      add_up<T>(
          rows, n.count,
          [=](int64_t c) {
            return [=](int64_t r) {
              const int e = element(r, c);
              return e < all ? d[e] : T(0);
            };
          },
          [=](int64_t c, T sum) { to_bias[c] += sum; });
    if (to_weight != nullptr)
      add_up<T>(
          rows, n.count,
          [=](int64_t c) {
            return [=](int64_t r) {
              const int e = element(r, c);
              return e < all ? d[e] * unit(e, e / n.size) : T(0);
            };
          },
          [=](int64_t c, T sum) { to_weight[c] += sum; });
  }

  // ---- conv
  // ----------------------------------------------------------------------------------------------------------

  static constexpr int kPixels = 4;  // of a map, and
  static constexpr int kOuts = 4;    // channels or taps, that a thread works on at a time

  /// to = maps with a frame of zeros, of `top` rows above and below and `side` columns at the sides.
  NODESHAPE_FUNCTION void frame(int maps, int height, int width, int top, int side, const T* from, T* to) const {
    const int framed_height = height + 2 * top, framed_width = width + 2 * side;
    spread(maps * framed_height * framed_width, [=](int64_t i) {
      const int row = int(i) / framed_width, map = row / framed_height;
      const int x = int(i) - row * framed_width - side, y = row - map * framed_height - top;
      const bool inside = x >= 0 && x < width && y >= 0 && y < height;
      to[i] = inside ? from[(map * height + y) * width + x] : T(0);
    });
  }

  /// sink(index, sum) for every element of a convolution of framed maps; a thread has `Outs` channels of pixels that
  /// lie apart, so that threads side by side read pixels side by side.
  template <int Outs, class Sink>
  NODESHAPE_INLINE void convolve(const Convolution& n, const T* weights, const T* from, Sink&& sink) const {
    const int across = (n.pixels() + kPixels - 1) / kPixels, packs = n.padded_out / Outs;
    spread(n.groups * packs * across, [=, &n](int64_t task) {
      const int q = int(task) % across, pack = int(task) / across % packs, group = int(task) / across / packs;
      const int in = n.in, kernel_height = n.kernel_height, kernel_width = n.kernel_width, padded_out = n.padded_out;
      const int map = n.map(), down = n.dilation_height * n.framed_width, right = n.dilation_width;
      int at[kPixels];
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        const int pixel = min(q + j * across, n.pixels() - 1), y = pixel / n.width;
        at[j] = y * n.framed_width + pixel - y * n.width;
      }
      const T* source = from + group * in * map;
      const T* w = weights + int64_t(group) * in * n.taps() * padded_out + pack * Outs;
      T sums[kPixels][Outs] = {};
      for (int i = 0; i < in; ++i, source += map)
        for (int ky = 0; ky < kernel_height; ++ky)
          for (int kx = 0; kx < kernel_width; ++kx, w += padded_out) {
            const T* x = source + ky * down + kx * right;
            T factors[Outs];
            if constexpr (Outs == Pack<T>::kCount) {
              const Pack<T> loaded = load_pack(w);
#pragma unroll
              for (int o = 0; o < Outs; ++o) factors[o] = loaded.lanes[o];
            } else {
              factors[0] = *w;
            }
#pragma unroll
            for (int j = 0; j < kPixels; ++j) {
              const T value = x[at[j]];
#pragma unroll
              for (int o = 0; o < Outs; ++o) sums[j][o] = fma(value, factors[o], sums[j][o]);
            }
          }
#pragma unroll
      for (int o = 0; o < Outs; ++o)
#pragma unroll
        for (int j = 0; j < kPixels; ++j) {
          const int channel = pack * Outs + o, pixel = q + j * across;
          if (channel < n.out && pixel < n.pixels()) sink((group * n.out + channel) * n.pixels() + pixel, sums[j][o]);
        }
    });
  }

  template <class Sink>
  NODESHAPE_INLINE void convolve(const Convolution& n, const T* weights, const T* from, Sink&& sink) const {
    if (n.padded_out % kOuts == 0)
      convolve<kOuts>(n, weights, from, sink);
    else
      convolve<1>(n, weights, from, sink);
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void conv(const Layer& layer) {
    const auto& n = layer.conv;
    const T *in = value(layer.a), *bias = value(layer.bias);
    T* out = written(layer.out);
    if (n.top > 0 || n.side > 0) {
      T* framed = written(layer.scratch);
      frame(n.forward.groups * n.forward.in, n.height, n.width, n.top, n.side, in, framed);
      in = framed;
    }
    const int pixels = n.forward.pixels();
    convolve(n.forward, in_global(layer.forward), in,
             [=](int i, T sum) { out[i] = bias == nullptr ? sum : sum + bias[i / pixels]; });
  }

  NODESHAPE_FUNCTION NODESHAPE_CALL void conv_vjp(const Layer& layer) {
    const auto& n = layer.conv;
    const int channels = n.forward.groups * n.forward.out, pixels = n.forward.pixels();
    const T *d = output_cotangent(layer.out), *in = value(n.top > 0 || n.side > 0 ? layer.scratch : layer.a);
    T *to = cotangent(layer.a), *to_weight = cotangent(layer.weight), *to_bias = cotangent(layer.bias);
    if (to_bias != nullptr)
      sum_groups(channels, pixels, [=](int e, int) { return d[e]; }, [=](int64_t o, T sum) { to_bias[o] += sum; });
    if (to_weight != nullptr) add_filter_gradient(n.forward, d, in, to_weight);
    if (n.back_top > 0 || n.back_side > 0) {
      frame(channels, n.forward.height, n.forward.width, n.back_top, n.back_side, d, scratch_);
      d = scratch_;
    }
    const bool add = layer.add_a;
    convolve(n.backward, in_global(layer.backward), d, [=](int i, T sum) { to[i] = add ? to[i] + sum : sum; });
  }

  /// filters [channels out, in, kernel height, kernel width] += the sum over pixels of the cotangents `d` and framed
  /// inputs; a thread has 4 output channels of 4 (input, tap).
  NODESHAPE_FUNCTION void add_filter_gradient(const Convolution& n, const T* d, const T* in, T* filters) const {
    const int depth = n.in * n.taps(), packs = (n.out + kOuts - 1) / kOuts, across = (depth + kOuts - 1) / kOuts;
    spread(n.groups * packs * across, [=, &n](int64_t task) {
      const int q = int(task) % across, pack = int(task) / across % packs, group = int(task) / across / packs;
      const int pixels = n.pixels(), framed_width = n.framed_width, width = n.width, height = n.height;
      const T* cotangents = d + group * n.out * pixels;
      const T* inputs = in + group * n.in * n.map();
      int x[kOuts], w[kOuts];
#pragma unroll
      for (int j = 0; j < kOuts; ++j) {
        const int k = min(q + j * across, depth - 1), i = k / n.taps(), tap = k - i * n.taps();
        const int ky = tap / n.kernel_width, kx = tap - ky * n.kernel_width;
        x[j] = i * n.map() + ky * n.dilation_height * framed_width + kx * n.dilation_width;
        w[j] = min(pack * kOuts + j, n.out - 1) * pixels;
      }
      T sums[kOuts][kOuts] = {};
      for (int row = 0; row < height; ++row, inputs += framed_width, cotangents += width)
        for (int column = 0; column < width; ++column) {
          T factors[kOuts];
#pragma unroll
          for (int o = 0; o < kOuts; ++o) factors[o] = cotangents[w[o] + column];
#pragma unroll
          for (int j = 0; j < kOuts; ++j) {
            const T value = inputs[x[j] + column];
#pragma unroll
            for (int o = 0; o < kOuts; ++o) sums[j][o] = fma(value, factors[o], sums[j][o]);
          }
        }
#pragma unroll
      for (int j = 0; j < kOuts; ++j)
#pragma unroll
        for (int o = 0; o < kOuts; ++o) {
          const int channel = pack * kOuts + o, k = q + j * across;
          if (channel < n.out && k < depth) filters[int64_t(group * n.out + channel) * depth + k] += sums[j][o];
        }
    });
  }

  const Weights& w_;
  int now_ = 0;  // the tape at hand
  Tape tapes_[kMostStages];
  const T* cotangent_ = nullptr;  // the latest argument of vjp()
  // Of the pull at hand:
  const T* above_ = nullptr;
  T* below_ = nullptr;
  bool gathers_ = false;
  T* cotangents_ = nullptr;
  T* scratch_ = nullptr;
  T* sums_ = nullptr;
  T* gradient_ = nullptr;  // [parameters]
  bool own_gradient_ = false;
  T *scaled_ = nullptr, *ignored_ = nullptr;  // [state]
};

}  // namespace nodeshape::cuda
