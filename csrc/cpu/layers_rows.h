// The layers of a program, forwards and backwards, for a few samples: a sample's buffers lie one behind the other, and
// lanes hold neighbouring elements of one buffer, so that a single sample fills them. See layers.h for many samples.
#pragma once

#include "arena.h"
#include "conv_direct.h"
#include "gemm.h"
#include "strides.h"
#include "transpose.h"
#include "../functions.h"
#include "../stage.h"

namespace nodeshape::NODESHAPE_TARGET {

/// A program's layers on single samples, a slot each. Values that the backward pass needs are kept in tapes, one for
/// each stage of a step.
template <class T>
class RowLayers {
 public:
  static constexpr int64_t kWide = kLanes<T>;

  NODESHAPE_OUTLINE RowLayers(const Program& program, const T* const* weights, Arena& arena, int64_t slots,
                              int64_t tapes, bool with_gradient)
      : p_(program), weights_(weights), slots_(slots), with_gradient_(with_gradient) {
    place_ = arena.take<int64_t>(p_.buffer_count);
    for (int64_t b = 0; b < p_.buffer_count; ++b) {
      place_[b] = row_;
      row_ += padded<T>(p_.buffers[b].size);
    }
    values_ = arena.zeros<T>(tapes * slots * row_ + kWide);  // a last vector may reach beyond what it is about
    pack_matrices(arena);
    plan_convolutions(arena);
    room_ = arena.zeros<T>(room_size_);
    if (!with_gradient) return;
    cotangents_ = arena.zeros<T>(slots * row_ + kWide);
    gradients_ = arena.take<T*>(p_.weight_count);
    matrices_ = arena.take<T*>(p_.weight_count);
    lanes_ = arena.take<T*>(p_.weight_count);
    for (int64_t k = 0; k < p_.weight_count; ++k) {
      const WeightUse& use = p_.weights[k];
      gradients_[k] = use.lanes ? arena.zeros<T>(use.size) : nullptr;
      matrices_[k] = use.rows > 0 ? arena.zeros<T>(use.rows * padded<T>(use.columns)) : nullptr;
      lanes_[k] = nullptr;
    }
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind == LayerKind::conv && lanes_[layer.weight] == nullptr)
        lanes_[layer.weight] = arena.zeros<T>(p_.weights[layer.weight].size * kWide);
    }
  }

  /// batch.out = f(t, batch.in), at the time `t` of each slot.
  NODESHAPE_OUTLINE void eval(int64_t tape, const T* t, const Batch<T>& batch) {
    T* const values = values_ + tape * slots_ * row_;
    const int64_t bytes = p_.state() * int64_t(sizeof(T));
    for (int i = 0; i < batch.count; ++i) {
      T* own = values + batch.slot[i] * row_;
      __builtin_memcpy(own + place_[0], batch.in[i], bytes);
      own[place_[1]] = t[batch.slot[i]];
    }
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind == LayerKind::linear)
        each_neighbours(batch, [&](int64_t slot, int64_t count) { linear(layer, l, values + slot * row_, count); });
      else
        for (int i = 0; i < batch.count; ++i) forward(layer, l, values + batch.slot[i] * row_);
    }
    for (int i = 0; i < batch.count; ++i)
      __builtin_memcpy(batch.out[i], values + batch.slot[i] * row_ + place_[p_.result], bytes);
  }

  /// batch.out = (df/dy)^T batch.in at the tape's linearisation; with `gradient`, dL/dp += (df/dp)^T batch.in too.
  NODESHAPE_OUTLINE void vjp(int64_t tape, const Batch<T>& batch, bool gradient) {
    const T* const values = values_ + tape * slots_ * row_;
    const int64_t bytes = p_.state() * int64_t(sizeof(T));
    for (int i = 0; i < batch.count; ++i) {
      T* own = cotangents_ + batch.slot[i] * row_;
      __builtin_memcpy(own + place_[p_.result], batch.in[i], bytes);
      if (p_.zero_state) __builtin_memset(own + place_[0], 0, bytes);
    }
    for (int64_t l = p_.layer_count - 1; l >= 0; --l) {
      const Layer& layer = p_.layers[l];
      if (!layer.live) continue;
      for (int i = 0; i < batch.count; ++i) {
        T* own = cotangents_ + batch.slot[i] * row_;
        if (layer.zero_a) clear(own, layer.a.buffer);
        if (layer.zero_b) clear(own, layer.b.buffer);
      }
      if (layer.kind == LayerKind::linear)
        each_neighbours(batch, [&](int64_t slot, int64_t count) {
          linear_vjp(layer, l, values + slot * row_, cotangents_ + slot * row_, count, gradient);
        });
      else
        for (int i = 0; i < batch.count; ++i)
          backward(layer, l, values + batch.slot[i] * row_, cotangents_ + batch.slot[i] * row_, gradient);
    }
    time_product_ = 0;
    for (int i = 0; i < batch.count; ++i) {
      T* own = cotangents_ + batch.slot[i] * row_;
      __builtin_memcpy(batch.out[i], own + place_[0], bytes);
      if (p_.uses_time) time_product_ += double(own[place_[1]]);
    }
  }

  /// w . df/dt of the latest vjp(), summed over the samples.
  double time_product() const { return time_product_; }

  /// Hand over what vjp() gathered, in the order of the weights, and start again from zero.
  NODESHAPE_OUTLINE void take_gradient(T* row) {
    for (int64_t k = 0; k < p_.weight_count; ++k) {
      const WeightUse& use = p_.weights[k];
      if (gradients_[k] != nullptr) {
        __builtin_memcpy(row, gradients_[k], use.size * sizeof(T));
        __builtin_memset(gradients_[k], 0, use.size * sizeof(T));
      } else {
        __builtin_memset(row, 0, use.size * sizeof(T));
      }
      if (lanes_[k] != nullptr) {
        for (int64_t i = 0; i < use.size; ++i) row[i] += sum<T>(load(lanes_[k] + i * kWide));
        __builtin_memset(lanes_[k], 0, use.size * kWide * sizeof(T));
      }
      if (use.rows > 0) {
        const int64_t stride = padded<T>(use.columns);
        for (int64_t r = 0; r < use.rows; ++r)
          for (int64_t c = 0; c < use.columns; ++c) row[r * use.columns + c] += matrices_[k][r * stride + c];
        __builtin_memset(matrices_[k], 0, use.rows * stride * sizeof(T));
      }
      row += use.size;
    }
  }

 private:
  template <class P>
  P* at(P* row, const Ref& ref) const {
    return row + place_[ref.buffer] + ref.offset;
  }
  const T* weight(int64_t k) const { return k < 0 ? nullptr : weights_[k]; }
  void clear(T* cotangents, int64_t buffer) const {
    __builtin_memset(cotangents + place_[buffer], 0, p_.buffers[buffer].size * sizeof(T));
  }
  /// Whether whole vectors of `count` elements from `ref` on stay within its buffer's place.
  bool has_room(const Ref& ref, int64_t count) const {
    return ref.offset + padded<T>(count) <= padded<T>(p_.buffers[ref.buffer].size);
  }
  /// Calls body(first, count) for each run of neighbouring slots.
  template <class Body>
  static void each_neighbours(const Batch<T>& batch, Body&& body) {
    for (int i = 0; i < batch.count;) {
      int end = i + 1;
      while (end < batch.count && batch.slot[end] == batch.slot[end - 1] + 1) ++end;
      body(int64_t(batch.slot[i]), int64_t(end - i));
      i = end;
    }
  }

  void forward(const Layer& layer, int64_t l, T* values) {
    switch (layer.kind) {
      case LayerKind::linear:
        return;  // of several samples at once
      case LayerKind::unary:
        return unary(layer, values);
      case LayerKind::binary:
        return binary(layer, values);
      case LayerKind::move:
        return move(layer, values);
      case LayerKind::norm:
        return norm(layer, values);
      case LayerKind::conv:
        return conv(layer, values, convolutions_[l]);
      case LayerKind::matmul:
        return matmul(layer, values);
    }
  }

  void backward(const Layer& layer, int64_t l, const T* values, T* cotangents, bool gradient) {
    switch (layer.kind) {
      case LayerKind::linear:
        return;
      case LayerKind::unary:
        return unary_vjp(layer, values, cotangents);
      case LayerKind::binary:
        return binary_vjp(layer, values, cotangents, gradient);
      case LayerKind::move:
        return move_vjp(layer, cotangents, gradient);
      case LayerKind::norm:
        return norm_vjp(layer, values, cotangents, gradient);
      case LayerKind::conv:
        return conv_vjp(layer, values, cotangents, convolutions_[l], gradient);
      case LayerKind::matmul:
        return matmul_vjp(layer, values, cotangents, gradient);
    }
  }

  // ---- linear: rows are samples, or positions of one ----------------------------------------------------------------

  struct Matrices {
    const T* forward;   // [in, padded out]
    const T* backward;  // [out, padded in]
  };

  void pack_matrices(Arena& arena) {
    packed_ = arena.take<Matrices>(p_.layer_count);
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind != LayerKind::linear) continue;
      const auto& n = layer.linear;
      const T* w = weights_[layer.weight];
      packed_[l].forward = packed(w, n.in, n.out, n.column, n.row, arena);
      packed_[l].backward = with_gradient_ ? packed(w, n.out, n.in, n.row, n.column, arena) : nullptr;
      need_room(n.positions * padded<T>(larger_of(n.in, n.out)));
    }
  }
  /// [rows, padded columns] of the matrix whose strides are `row` and `column`, one of them 1.
  static const T* packed(const T* w, int64_t rows, int64_t columns, int64_t row, int64_t column, Arena& arena) {
    const int64_t stride = padded<T>(columns);
    if (column == 1 && row == stride) return w;
    T* to = arena.zeros<T>(rows * stride);
    if (column == 1)
      for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * stride, w + r * row, columns * sizeof(T));
    else
      transpose<T>(columns, rows, w, column, to, stride);
    return to;
  }

  NODESHAPE_OUTLINE void linear(const Layer& layer, int64_t l, T* values, int64_t count) {
    const auto& n = layer.linear;
    const T *in = at(values, layer.a), *bias = weight(layer.bias);
    T* out = at(values, layer.out);
    if (n.positions == 1 && has_room(layer.out, n.out))
      return products(count, n.out, n.in, in, row_, packed_[l].forward, bias, out, row_);
    for (int64_t s = 0; s < count; ++s, in += row_, out += row_) {
      const int64_t stride = padded<T>(n.out);
      products(n.positions, n.out, n.in, in, n.in, packed_[l].forward, bias, room_, stride);
      for (int64_t p = 0; p < n.positions; ++p)
        __builtin_memcpy(out + p * n.out, room_ + p * stride, n.out * sizeof(T));
    }
  }
  /// c[rows, columns] = start + a[rows, depth] b[depth, padded columns], to whole vectors.
  static void products(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, const T* b,
                       const T* start, T* c, int64_t c_row) {
    const int64_t width = padded<T>(columns);
    if (start == nullptr) return gemm<T, false>(rows, width, depth, {a, a_row, 1}, b, width, c, c_row);
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(c + r * c_row, start, columns * sizeof(T));
    gemm<T, true>(rows, width, depth, {a, a_row, 1}, b, width, c, c_row);
  }

  NODESHAPE_OUTLINE void linear_vjp(const Layer& layer, int64_t l, const T* values, T* cotangents, int64_t count,
                                    bool gradient) {
    const auto& n = layer.linear;
    const T *in = at(values, layer.a), *d = at(cotangents, layer.out);
    T* to = at(cotangents, layer.a);
    const bool together = n.positions == 1;
    const int64_t samples = together ? 1 : count, rows = together ? count : n.positions;
    const int64_t in_row = together ? row_ : n.in, out_row = together ? row_ : n.out;
    for (int64_t s = 0; s < samples; ++s, in += row_, d += row_, to += row_) {
      if (gradient) {
        const bool outputs_first = n.column == 1;
        const int64_t stride = padded<T>(outputs_first ? n.in : n.out);
        if (outputs_first)
          gemm<T, true>(n.out, stride, rows, {d, 1, out_row}, in, in_row, matrices_[layer.weight], stride);
        else
          gemm<T, true>(n.in, stride, rows, {in, 1, in_row}, d, out_row, matrices_[layer.weight], stride);
        if (layer.bias >= 0)
          for (int64_t r = 0; r < rows; ++r) add_to(gradients_[layer.bias], n.out, d + r * out_row);
      }
      const int64_t stride = padded<T>(n.in);
      if (together && has_room(layer.a, n.in)) {
        if (layer.add_a)
          gemm<T, true>(rows, stride, n.out, {d, out_row, 1}, packed_[l].backward, stride, to, in_row);
        else
          gemm<T, false>(rows, stride, n.out, {d, out_row, 1}, packed_[l].backward, stride, to, in_row);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        gemm<T, false>(1, stride, n.out, {d + r * out_row, out_row, 1}, packed_[l].backward, stride, room_, stride);
        if (layer.add_a)
          add_to(to + r * in_row, n.in, room_);
        else
          __builtin_memcpy(to + r * in_row, room_, n.in * sizeof(T));
      }
    }
  }
  static void add_to(T* to, int64_t count, const T* x) {
    each_part<T>(count, [=](int64_t i, auto n) { store(to + i, load(to + i, n) + load(x + i, n), n); });
  }

  // ---- functions of one element -------------------------------------------------------------------------------------

  static Constants<T> constants(const Layer& layer) {
    return {splat(T(layer.c[0])), splat(T(layer.c[1])), splat(T(layer.c[2]))};
  }

  NODESHAPE_OUTLINE void unary(const Layer& layer, T* values) {
    const T* x = at(values, layer.a);
    T* out = at(values, layer.out);
    const Constants<T> k = constants(layer);
    with_unary(Unary(layer.function), [&]<Unary F>() {
      each_part<T>(layer.unary.count,
                   [=, &k](int64_t i, auto n) { store(out + i, apply<F, T>(load(x + i, n), k), n); });
    });
  }

  NODESHAPE_OUTLINE void unary_vjp(const Layer& layer, const T* values, T* cotangents) {
    const T *x = at(values, layer.a), *y = at(values, layer.out), *d = at(cotangents, layer.out);
    T* to = at(cotangents, layer.a);
    const Constants<T> k = constants(layer);
    const bool add = layer.add_a;
    with_unary(Unary(layer.function), [&]<Unary F>() {
      each_part<T>(layer.unary.count, [=, &k](int64_t i, auto n) {
        const Vec<T> steep = slope<F, T>(load(x + i, n), load(y + i, n), k), w = load(d + i, n);
        store(to + i, add ? fma(w, steep, load(to + i, n)) : w * steep, n);
      });
    });
  }

  // ---- elements chosen by strides -----------------------------------------------------------------------------------

  const T* operand(const Ref& ref, const T* values) const {
    return ref.is_weight() ? weights_[ref.weight()] + ref.offset : at(values, ref);
  }

  /// Where an operand's cotangent goes.
  struct Target {
    T* data;  // null where it is not wanted
    bool add;
  };
  Target target(const Ref& ref, bool add, bool gradient, T* cotangents) const {
    if (ref.is_weight()) return {gradient ? gradients_[ref.weight()] + ref.offset : nullptr, true};
    return {at(cotangents, ref), add};
  }

  /// Elements i, i + 1, ... of a run of some stride.
  template <class N>
  static NODESHAPE_INLINE Vec<T> pick(const T* x, int64_t stride, int64_t i, N n) {
    if (stride == 1) return load(x + i, n);
    if (stride == 0) return splat(*x);
    Vec<T> v{};
    for (int64_t lane = 0; lane < lanes_of<T>(n); ++lane) v[lane] = x[(i + lane) * stride];
    return v;
  }
  /// A run's cotangents body(i, n), to where its elements are.
  template <class Body>
  static NODESHAPE_INLINE void spread_run(const Target& to, int64_t first, int64_t stride, int64_t count, Body&& body) {
    T* data = to.data + first;
    if (stride == 0) {
      T whole = to.add ? *data : T(0);
      each_part<T>(count, [&](int64_t i, auto n) { whole += sum<T>(body(i, n), n); });
      *data = whole;
      return;
    }
    const bool add = to.add;
    each_part<T>(count, [=, &body](int64_t i, auto n) {
      const Vec<T> v = body(i, n);
      if (stride == 1) return store(data + i, add ? load(data + i, n) + v : v, n);
      for (int64_t lane = 0; lane < lanes_of<T>(n); ++lane) {
        T* one = data + (i + lane) * stride;
        *one = add ? *one + v[lane] : v[lane];
      }
    });
  }

  NODESHAPE_OUTLINE void binary(const Layer& layer, T* values) {
    const T *a = operand(layer.a, values), *b = operand(layer.b, values);
    T* out = at(values, layer.out);
    with_binary(Binary(layer.function), [&]<Binary F>() {
      each_run(layer.strides, [=](int64_t first, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
        each_part<T>(count, [=](int64_t i, auto n) {
          store(out + first + i, combine<F>(pick(a + ra, sa, i, n), pick(b + rb, sb, i, n)), n);
        });
      });
    });
  }

  NODESHAPE_OUTLINE void binary_vjp(const Layer& layer, const T* values, T* cotangents, bool gradient) {
    const T *a = operand(layer.a, values), *b = operand(layer.b, values), *d = at(cotangents, layer.out);
    const Target to_a = target(layer.a, layer.add_a, gradient, cotangents),
                 to_b = target(layer.b, layer.add_b, gradient, cotangents);
    with_binary(Binary(layer.function), [&]<Binary F>() {
      each_run(layer.strides, [&](int64_t first, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
        const T *x = a + ra, *y = b + rb, *w = d + first;
        if (to_a.data != nullptr)
          spread_run(to_a, ra, sa, count, [=](int64_t i, auto n) {
            return to_first<F>(load(w + i, n), pick(x, sa, i, n), pick(y, sb, i, n));
          });
        if (to_b.data != nullptr)
          spread_run(to_b, rb, sb, count, [=](int64_t i, auto n) {
            return to_second<F>(load(w + i, n), pick(x, sa, i, n), pick(y, sb, i, n));
          });
      });
    });
  }

  NODESHAPE_OUTLINE void move(const Layer& layer, T* values) {
    if (layer.is_copy()) {
      const T* from = at(values, layer.a);
      T* to = at(values, layer.out);
      for (int64_t i = 0; i < layer.strides.sizes[0]; ++i) to[i] = from[i];
      return;
    }
    const T* a = operand(layer.a, values);
    T* out = at(values, layer.out);
    const Move how = Move(layer.function);
    const T scale = T(layer.c[0]);
    if (how != Move::copy) {  // whose places are dense
      int64_t places = 1;
      for (int64_t d = 0; d < layer.strides.dims; ++d)
        if (layer.strides.b[d] != 0) places *= layer.strides.sizes[d];
      for (int64_t i = 0; i < places; ++i) out[i] = how == Move::sum ? T(0) : -T(__builtin_inf());
    }
    each_run(layer.strides, [=](int64_t, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
      const T* from = a + ra;
      T* to = out + rb;
      if (how == Move::largest) {
        for (int64_t i = 0; i < count; ++i) {
          const T x = scale * from[i * sa], most = to[i * sb];
          to[i * sb] = most != most ? most : (most > x ? most : x);
        }
        return;
      }
      spread_run({to, how == Move::sum}, 0, sb, count,
                 [=](int64_t i, auto n) { return splat(scale) * pick(from, sa, i, n); });
    });
  }

  NODESHAPE_OUTLINE void move_vjp(const Layer& layer, T* cotangents, bool gradient) {
    if (layer.is_copy()) {
      const T* d = at(cotangents, layer.out);
      T* to = at(cotangents, layer.a);
      for (int64_t i = 0; i < layer.strides.sizes[0]; ++i) to[i] = layer.add_a ? to[i] + d[i] : d[i];
      return;
    }
    const Target to = target(layer.a, layer.add_a, gradient, cotangents);
    if (to.data == nullptr) return;
    const T* d = at(cotangents, layer.out);
    const Vec<T> scale = splat(T(layer.c[0]));
    each_run(layer.strides, [=](int64_t, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
      spread_run(to, ra, sa, count, [=](int64_t i, auto n) { return scale * pick(d + rb, sb, i, n); });
    });
  }

  // ---- norm ---------------------------------------------------------------------------------------------------------

  /// Elements of a group that share a scale, or each have the next one.
  struct Scales {
    const T* data;  // null for `otherwise`
    T otherwise;
    int64_t step;

    template <class N>
    NODESHAPE_INLINE Vec<T> get(int64_t channel, int64_t i, N n) const {
      if (data == nullptr) return splat(otherwise);
      return step == 0 ? splat(data[channel]) : load(data + channel + i, n);
    }
  };
  /// Calls body(from, to, channel): elements [from, to) of group g have one channel, or `channel` and those behind it.
  template <class Norm, class Body>
  static NODESHAPE_INLINE void each_scale(const Norm& n, int64_t g, Body&& body) {
    each_channel(n.size, g * n.size, n.inner == 1 ? n.count : n.inner, n.inner == 1 ? 1 : n.count,
                 [&](int64_t from, int64_t to, int64_t channel) {
                   body(from, to, n.inner == 1 ? (g * n.size + from) % n.count : channel);
                 });
  }

  NODESHAPE_OUTLINE void norm(const Layer& layer, T* values) {
    const auto& n = layer.norm;
    const T* in = at(values, layer.a);
    T *out = at(values, layer.out), *kept = values + place_[layer.scratch];
    const int64_t step = n.inner == 1;
    const Scales scales{weight(layer.weight), T(1), step}, shifts{weight(layer.bias), T(0), step};
    const T share = T(1) / T(n.size);
    for (int64_t g = 0; g < n.groups; ++g, in += n.size, out += n.size) {
      const T mean = share * sum_part(n.size, [=](int64_t i, auto m) { return load(in + i, m); });
      const T variance = share * sum_part(n.size, [=](int64_t i, auto m) {
                           const Vec<T> c = load(in + i, m) - splat(mean);
                           return c * c;
                         });
      const T inverse = T(1) / root_of(variance + T(layer.c[0]));
      kept[2 * g] = mean;
      kept[2 * g + 1] = inverse;
      each_scale(n, g, [=](int64_t from, int64_t to, int64_t channel) {
        each_part<T>(to - from, [=](int64_t i, auto m) {
          const Vec<T> scale = splat(inverse) * scales.get(channel, i, m);
          store(out + from + i, fma(load(in + from + i, m) - splat(mean), scale, shifts.get(channel, i, m)), m);
        });
      });
    }
  }

  NODESHAPE_OUTLINE void norm_vjp(const Layer& layer, const T* values, T* cotangents, bool gradient) {
    const auto& n = layer.norm;
    const T *in = at(values, layer.a), *kept = values + place_[layer.scratch], *d = at(cotangents, layer.out);
    T* to = at(cotangents, layer.a);
    T* to_w = gradient && layer.weight >= 0 ? gradients_[layer.weight] : nullptr;
    T* to_bias = gradient && layer.bias >= 0 ? gradients_[layer.bias] : nullptr;
    const int64_t step = n.inner == 1;
    const Scales scales{weight(layer.weight), T(1), step};
    const bool add = layer.add_a;
    for (int64_t g = 0; g < n.groups; ++g, in += n.size, d += n.size, to += n.size) {
      const Vec<T> mean = splat(kept[2 * g]), inverse = splat(kept[2 * g + 1]);
      T plain = 0, along = 0;  // sums of the scaled cotangent, and of it times the normalised value
      each_scale(n, g, [&](int64_t from, int64_t end, int64_t channel) {
        const T *x = in + from, *z = d + from;
        const auto unit = [=](int64_t i, auto m) { return (load(x + i, m) - mean) * inverse; };
        plain += sum_part(end - from, [=](int64_t i, auto m) { return load(z + i, m) * scales.get(channel, i, m); });
        along += sum_part(end - from,
                          [=](int64_t i, auto m) { return load(z + i, m) * scales.get(channel, i, m) * unit(i, m); });
        if (to_bias != nullptr)
          spread_run({to_bias, true}, channel, step, end - from, [=](int64_t i, auto m) { return load(z + i, m); });
        if (to_w != nullptr)
          spread_run({to_w, true}, channel, step, end - from,
                     [=](int64_t i, auto m) { return load(z + i, m) * unit(i, m); });
      });
      const Vec<T> plainly = splat(plain / T(n.size)), along_unit = splat(along / T(n.size));
      each_scale(n, g, [=](int64_t from, int64_t end, int64_t channel) {
        each_part<T>(end - from, [=](int64_t i, auto m) {
          const Vec<T> unit = (load(in + from + i, m) - mean) * inverse;
          const Vec<T> scaled = load(d + from + i, m) * scales.get(channel, i, m);
          const Vec<T> dz = inverse * (scaled - plainly - unit * along_unit);
          store(to + from + i, add ? load(to + from + i, m) + dz : dz, m);
        });
      });
    }
  }

  // ---- conv: maps in a frame of zeros, all positions of a map in one run, those between rows for nothing
  // -------------

  struct Convolution {
    ConvSizes sizes;
    int64_t run, back_run;   // positions from the first to the last, in rows of what is framed, to whole vectors
    Taps forward, backward;  // within a group
  };

  void plan_convolutions(Arena& arena) {
    convolutions_ = arena.take<Convolution>(p_.layer_count);
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind != LayerKind::conv) continue;
      const auto& n = layer.conv;
      const ConvSizes c = conv_sizes(layer);
      Convolution& plan = convolutions_[l];
      plan.sizes = c;
      plan.run = padded<T>((c.out_y - 1) * c.in_x + c.out_x);
      plan.back_run = padded<T>((n.height - 1) * c.back_x + n.width);
      plan.forward = forward_taps(layer, c, 1, arena);
      if (with_gradient_) plan.backward = backward_taps(layer, c, 1, arena);
      const int64_t maps = larger_of(n.out * plan.run, c.in * plan.back_run);
      need_room(framed_cotangent(n.out, c) + maps);
    }
  }
  /// Elements that the framed cotangent takes, and a vector that may be read beyond it.
  static int64_t framed_cotangent(int64_t maps, const ConvSizes& c) {
    return padded<T>(maps * c.back_y * c.back_x) + kWide;
  }

  /// to[maps, height, width] (+)= from, whose maps have `run` elements and rows `row`.
  static void take_rows(int64_t maps, int64_t height, int64_t width, const T* from, int64_t run, int64_t row, bool add,
                        T* to) {
    if (row == width) {
      width *= height;
      height = 1;
    }
    for (int64_t m = 0; m < maps; ++m)
      for (int64_t y = 0; y < height; ++y, to += width) {
        const T* x = from + m * run + y * row;
        each_part<T>(width, [=](int64_t i, auto n) {
          store(to + i, add ? load(to + i, n) + load(x + i, n) : load(x + i, n), n);
        });
      }
  }

  /// A group's framed input.
  const T* framed(const Layer& layer, const T* values) const {
    const auto& n = layer.conv;
    return n.pad_height > 0 || n.pad_width > 0 ? values + place_[layer.scratch] : at(values, layer.a);
  }

  NODESHAPE_OUTLINE void conv(const Layer& layer, T* values, const Convolution& plan) {
    const auto& n = layer.conv;
    const ConvSizes& c = plan.sizes;
    const T *w = weight(layer.weight), *bias = weight(layer.bias), *in = framed(layer, values);
    T* out = at(values, layer.out);
    if (in != at(values, layer.a))
      frame<T>(n.in, n.height, n.width, n.pad_height, n.pad_width, at(values, layer.a), values + place_[layer.scratch]);
    for (int64_t g = 0; g < n.groups; ++g) {
      convolve<T>(c.out, 1, plan.run, plan.forward, w + g * c.out * plan.forward.w_row, in + g * c.in * c.in_y * c.in_x,
                  0, bias == nullptr ? nullptr : bias + g * c.out, false, room_);
      take_rows(c.out, c.out_y, c.out_x, room_, plan.run, c.in_x, false, out + g * c.out * c.out_y * c.out_x);
    }
  }

  NODESHAPE_OUTLINE void conv_vjp(const Layer& layer, const T* values, T* cotangents, const Convolution& plan,
                                  bool gradient) {
    const auto& n = layer.conv;
    const ConvSizes& c = plan.sizes;
    const T *w = weight(layer.weight), *in = framed(layer, values), *d = at(cotangents, layer.out);
    T *to = at(cotangents, layer.a), *maps = room_ + framed_cotangent(n.out, c);
    const int64_t area = c.out_y * c.out_x, weights = c.out * plan.forward.depth;
    if (gradient && layer.bias >= 0)
      for (int64_t o = 0; o < n.out; ++o)
        gradients_[layer.bias][o] += sum_part(area, [=](int64_t i, auto m) { return load(d + o * area + i, m); });
    if (gradient) {  // in rows of the framed input, with zeros between
      __builtin_memset(maps, 0, n.out * plan.run * sizeof(T));
      for (int64_t o = 0; o < n.out; ++o)
        for (int64_t y = 0; y < c.out_y; ++y)
          __builtin_memcpy(maps + o * plan.run + y * c.in_x, d + o * area + y * c.out_x, c.out_x * sizeof(T));
      for (int64_t g = 0; g < n.groups; ++g)
        convolve_products<T>(c.out, 1, plan.run, plan.forward, maps + g * c.out * plan.run,
                             in + g * c.in * c.in_y * c.in_x, 0, lanes_[layer.weight] + g * weights * kWide);
    }
    if (c.top > 0 || c.side > 0) {
      frame<T>(n.out, c.out_y, c.out_x, c.top, c.side, d, room_);
      d = room_;
    }
    for (int64_t g = 0; g < n.groups; ++g) {
      convolve<T>(c.in, 1, plan.back_run, plan.backward, w + g * weights, d + g * c.out * c.back_y * c.back_x, 0,
                  nullptr, false, maps);
      take_rows(c.in, n.height, n.width, maps, plan.back_run, c.back_x, layer.add_a,
                to + g * c.in * n.height * n.width);
    }
  }

  // ---- matmul: out[i, r, c] = sum_k a[i, r, k] b[i, k, c] -----------------------------------------------------------

  NODESHAPE_OUTLINE void matmul(const Layer& layer, T* values) {
    const auto& n = layer.matmul;
    T* out = at(values, layer.out);
    each_matrix_row(layer, [&](int64_t ra, int64_t rb, int64_t first) {
      const T *a = operand(layer.a, values) + ra, *b = operand(layer.b, values) + rb;
      if (n.columns == 1) {
        out[first] =
            sum_part(n.depth, [=](int64_t k, auto m) { return pick(a, n.a[2], k, m) * pick(b, n.b[1], k, m); });
        return;
      }
      T* to = out + first;
      for (int64_t k = 0; k < n.depth; ++k) {
        const Vec<T> factor = splat(a[k * n.a[2]]);
        const T* row = b + k * n.b[1];
        each_part<T>(n.columns, [=](int64_t i, auto m) {
          const Vec<T> x = pick(row, n.b[2], i, m);
          store(to + i, k == 0 ? factor * x : fma(factor, x, load(to + i, m)), m);
        });
      }
    });
  }

  NODESHAPE_OUTLINE void matmul_vjp(const Layer& layer, const T* values, T* cotangents, bool gradient) {
    const auto& n = layer.matmul;
    const Target to_a = target(layer.a, true, gradient, cotangents), to_b = target(layer.b, true, gradient, cotangents);
    each_matrix_row(layer, [&](int64_t ra, int64_t rb, int64_t first) {
      const T *a = operand(layer.a, values) + ra, *b = operand(layer.b, values) + rb;
      const T* d = at(cotangents, layer.out) + first;
      if (n.columns == 1) {
        const Vec<T> w = splat(*d);
        if (to_a.data != nullptr)
          spread_run(to_a, ra, n.a[2], n.depth, [=](int64_t k, auto m) { return w * pick(b, n.b[1], k, m); });
        if (to_b.data != nullptr)
          spread_run(to_b, rb, n.b[1], n.depth, [=](int64_t k, auto m) { return w * pick(a, n.a[2], k, m); });
        return;
      }
      for (int64_t k = 0; k < n.depth; ++k) {
        const T* row = b + k * n.b[1];
        if (to_a.data != nullptr)
          spread_run(to_a, ra + k * n.a[2], 0, n.columns,
                     [=](int64_t i, auto m) { return load(d + i, m) * pick(row, n.b[2], i, m); });
        const Vec<T> factor = splat(a[k * n.a[2]]);
        if (to_b.data != nullptr)
          spread_run(to_b, rb + k * n.b[1], n.b[2], n.columns,
                     [=](int64_t i, auto m) { return factor * load(d + i, m); });
      }
    });
  }
  /// Calls body(place in a, place in b, place in out) for each row of the products.
  template <class Body>
  static void each_matrix_row(const Layer& layer, Body&& body) {
    const auto& n = layer.matmul;
    for (int64_t i = 0; i < n.batch; ++i)
      for (int64_t r = 0; r < n.rows; ++r) body(i * n.a[0] + r * n.a[1], i * n.b[0], (i * n.rows + r) * n.columns);
  }

  // ---- sums and room ------------------------------------------------------------------------------------------------

  template <class Body>
  static NODESHAPE_INLINE T sum_part(int64_t count, Body&& body) {
    Vec<T> s0{}, s1{};
    int64_t i = 0;
    for (; i + 2 * kWide <= count; i += 2 * kWide) {
      s0 += body(i, Whole{});
      s1 += body(i + kWide, Whole{});
    }
    if (i + kWide <= count) {
      s0 += body(i, Whole{});
      i += kWide;
    }
    T total = sum<T>(s0 + s1);
    if (i < count) total += sum<T>(body(i, Part{count - i}), Part{count - i});
    return total;
  }
  static int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
  void need_room(int64_t elements) { room_size_ = larger_of(room_size_, elements); }

  const Program& p_;
  const T* const* weights_;
  const int64_t slots_;
  const bool with_gradient_;
  int64_t row_ = 0;            // elements of a sample's buffers
  int64_t* place_;             // of each buffer in a row
  T* values_;                  // [tapes, slots, row]
  T* cotangents_ = nullptr;    // [slots, row]
  Matrices* packed_;           // [layers]
  Convolution* convolutions_;  // [layers]
  T* room_;                    // for one layer at a time
  int64_t room_size_ = 0;
  T** gradients_ = nullptr;  // [weights], of what is gathered element by element
  T** matrices_ = nullptr;   // [weights] of [rows, padded columns]
  T** lanes_ = nullptr;      // [weights] of [elements, lanes], of convolutions
  double time_product_ = 0;
};

}  // namespace nodeshape::NODESHAPE_TARGET
