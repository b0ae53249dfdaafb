// The layers of a program, forwards and backwards, for a tile of samples: row e of a buffer [size, width] holds element
// e of `width` samples, a lane each, so that samples never meet and any view of a sample is a choice of rows.
#pragma once

#include "arena.h"
#include "conv_direct.h"
#include "conv_winograd.h"
#include "gemm.h"
#include "strides.h"
#include "transpose.h"
#include "../functions.h"

namespace nodeshape::NODESHAPE_TARGET {

/// A program's layers on one tile. Values that the backward pass needs are kept in tapes, one for each stage of a step.
template <class T>
class Layers {
 public:
  static constexpr int64_t kWide = kLanes<T>;

  /// `width`, a multiple of the vector; without a gradient one tape, whose values overwrite each other. With
  /// `attached`, what the backward pass reads is where attach() says.
  NODESHAPE_OUTLINE Layers(const Program& program, const T* const* weights, Arena& arena, int64_t width, int64_t tapes,
                           bool with_gradient, bool attached = false)
      : p_(program), weights_(weights), width_(width), members_(width), with_gradient_(with_gradient) {
    const bool keeps = with_gradient && !attached;
    values_ = arena.take<T*>(tapes * p_.buffer_count);
    T* values = nullptr;
    for (int64_t k = 0; k < tapes; ++k) {
      if (k == 0 || keeps) values = arena.take<T>((keeps ? p_.kept : p_.brief) * width);
      for (int64_t b = 0; b < p_.buffer_count; ++b)
        value(k, b) = values + (keeps ? p_.buffers[b].kept : p_.buffers[b].brief) * width;
    }
    if (attached) {
      places_ = arena.take<int64_t>(p_.buffer_count);
      tape_ = lay_out(p_, places_);
    }
    plan_convolutions(arena);
    if (!with_gradient) return;
    cotangents_ = arena.take<T*>(p_.buffer_count);
    T* memory = arena.take<T>(p_.cotangents * width);
    for (int64_t b = 0; b < p_.buffer_count; ++b) cotangents_[b] = memory + p_.buffers[b].cotangent * width;
    scratch_ = arena.take<T>(p_.scratch * width);
    lanes_ = arena.take<T*>(p_.weight_count);
    matrices_ = arena.take<T*>(p_.weight_count);
    int64_t widest = 0;
    for (int64_t k = 0; k < p_.weight_count; ++k) {
      const WeightUse& use = p_.weights[k];
      lanes_[k] = use.lanes ? arena.zeros<T>(use.size * kWide) : nullptr;
      matrices_[k] = use.rows > 0 ? arena.zeros<T>(use.rows * padded<T>(use.columns)) : nullptr;
      if (use.rows > 0 && padded<T>(use.columns) > widest) widest = padded<T>(use.columns);
    }
    turned_ = arena.zeros<T>(widest * width);
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind == LayerKind::conv && plans_[l].fast == nullptr && lanes_[layer.weight] == nullptr)
        lanes_[layer.weight] = arena.zeros<T>(p_.weights[layer.weight].size * kWide);
    }
  }

  /// Elements per sample of a tape: all that the backward pass reads of an evaluation, the state first. `places`, if
  /// not null, is given each buffer's place in it, or -1.
  static int64_t lay_out(const Program& p, int64_t* places) {
    int64_t total = 0;
    const auto add = [&](int64_t b, bool read) {
      if (places != nullptr) places[b] = read ? total : -1;
      if (read) total += p.buffers[b].size;
    };
    add(0, true);
    for (int64_t b = 1; b < p.buffer_count; ++b) add(b, p.buffers[b].read && !is_idle_frame(p, b));
    return total;
  }
  int64_t tape() const { return tape_; }
  /// Of the result in a tape, or -1.
  int64_t result_place() const { return places_[p_.result]; }
  void attach(int64_t tape, T* memory) {
    for (int64_t b = 0; b < p_.buffer_count; ++b)
      if (places_[b] >= 0) value(tape, b) = memory + places_[b] * width_;
  }

  /// Only the first `count` lanes have a cotangent from now on.
  void set_members(int64_t count) { members_ = count; }

  /// out[state, width] = f(t, in), at the time `t` of each lane; `in` and `out` stay in place while the tape is used.
  NODESHAPE_OUTLINE void eval(int64_t tape, const T* t, T* in, T* out) {
    T** values = values_ + tape * p_.buffer_count;
    values[0] = in;
    values[p_.result] = out;
    __builtin_memcpy(values[1], t, width_ * sizeof(T));
    for (int64_t l = 0; l < p_.layer_count; ++l) forward(p_.layers[l], values, l);
  }

  /// to[state, width] = (df/dy)^T w at the tape's linearisation; with `gradient`, dL/dp += (df/dp)^T w too.
  NODESHAPE_OUTLINE void vjp(int64_t tape, const T* w, T* to, bool gradient) {
    T* const* values = values_ + tape * p_.buffer_count;
    cotangents_[0] = to;
    cotangents_[p_.result] = const_cast<T*>(w);  // which no layer reads, so that nothing is added to it
    if (p_.zero_state) __builtin_memset(to, 0, p_.state() * width_ * sizeof(T));
    for (int64_t l = p_.layer_count - 1; l >= 0; --l)
      if (p_.layers[l].live) backward(p_.layers[l], values, l, gradient);
  }

  /// w . df/dt of the latest vjp(), summed over the samples.
  double time_product() const {
    if (!p_.uses_time) return 0;
    return double(total<T>(width_, [this](int64_t i) { return load(cotangents_[1] + i); }));
  }

  /// Hand over what vjp() gathered, in the order of the weights, and start again from zero.
  NODESHAPE_OUTLINE void take_gradient(T* row) {
    T* const first = row;
    for (int64_t k = 0; k < p_.weight_count; ++k) {
      const WeightUse& use = p_.weights[k];
      for (int64_t i = 0; i < use.size; ++i) row[i] = lanes_[k] != nullptr ? sum<T>(load(lanes_[k] + i * kWide)) : T(0);
      if (lanes_[k] != nullptr) __builtin_memset(lanes_[k], 0, use.size * kWide * sizeof(T));
      if (use.rows > 0) {
        const int64_t stride = padded<T>(use.columns);
        for (int64_t r = 0; r < use.rows; ++r)
          for (int64_t c = 0; c < use.columns; ++c) row[r * use.columns + c] += matrices_[k][r * stride + c];
        __builtin_memset(matrices_[k], 0, use.rows * stride * sizeof(T));
      }
      row += use.size;
    }
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind != LayerKind::conv || plans_[l].fast == nullptr) continue;
      T* own = first;
      for (int64_t k = 0; k < layer.weight; ++k) own += p_.weights[k].size;
      const int64_t group = p_.weights[layer.weight].size / layer.conv.groups;
      for (int64_t g = 0; g < layer.conv.groups; ++g) plans_[l].fast[g]->take_gradient(own + g * group);
    }
  }

 private:
  T*& value(int64_t tape, int64_t buffer) { return values_[tape * p_.buffer_count + buffer]; }
  T* at(T* const* buffers, const Ref& ref) const { return buffers[ref.buffer] + ref.offset * width_; }
  const T* weight(int64_t k) const { return k < 0 ? nullptr : weights_[k]; }

  void forward(const Layer& layer, T* const* values, int64_t l) {
    switch (layer.kind) {
      case LayerKind::linear:
        return linear(layer, values);
      case LayerKind::unary:
        return unary(layer, values);
      case LayerKind::binary:
        return binary(layer, values);
      case LayerKind::move:
        return move(layer, values);
      case LayerKind::norm:
        return norm(layer, values);
      case LayerKind::conv:
        return conv(layer, values, plans_[l]);
      case LayerKind::matmul:
        return matmul(layer, values);
    }
  }

  void backward(const Layer& layer, T* const* values, int64_t l, bool gradient) {
    if (layer.zero_a) clear(cotangents_[layer.a.buffer], p_.buffers[layer.a.buffer].size);
    if (layer.zero_b) clear(cotangents_[layer.b.buffer], p_.buffers[layer.b.buffer].size);
    switch (layer.kind) {
      case LayerKind::linear:
        return linear_vjp(layer, values, gradient);
      case LayerKind::unary:
        return unary_vjp(layer, values);
      case LayerKind::binary:
        return binary_vjp(layer, values, gradient);
      case LayerKind::move:
        return move_vjp(layer, gradient);
      case LayerKind::norm:
        return norm_vjp(layer, values, gradient);
      case LayerKind::conv:
        return conv_vjp(layer, values, plans_[l], gradient);
      case LayerKind::matmul:
        return matmul_vjp(layer, values, gradient);
    }
  }

  void clear(T* rows, int64_t count) { __builtin_memset(rows, 0, count * width_ * sizeof(T)); }

  /// Calls body(i) for each vector of `count` rows.
  template <class Body>
  NODESHAPE_INLINE void each_vector(int64_t count, Body&& body) const {
    for (int64_t i = 0, end = count * width_; i < end; i += kWide) body(i);
  }

  /// sums[lane] += the rows of x, each down to one vector, for row e at sums[e lanes].
  void add_lanes(int64_t count, const T* x, T* sums) const {
    for (int64_t e = 0; e < count; ++e) {
      Vec<T> sum = load(sums + e * kWide);
      for (int64_t v = 0; v < width_; v += kWide) sum += load(x + e * width_ + v);
      store(sums + e * kWide, sum);
    }
  }

  // ---- linear: out[o] = bias[o] + sum_i W[o, i] a[i], for each position ---------------------------------------------

  NODESHAPE_OUTLINE void linear(const Layer& layer, T* const* values) {
    const auto& n = layer.linear;
    const T *w = weight(layer.weight), *bias = weight(layer.bias), *in = at(values, layer.a);
    T* out = at(values, layer.out);
    for (int64_t p = 0; p < n.positions; ++p, in += n.in * width_, out += n.out * width_)
      gemm<T, false>(n.out, width_, n.in, {w, n.row, n.column}, in, width_, out, width_, bias);
  }

  NODESHAPE_OUTLINE void linear_vjp(const Layer& layer, T* const* values, bool gradient) {
    const auto& n = layer.linear;
    const T *w = weight(layer.weight), *in = at(values, layer.a), *d = at(cotangents_, layer.out);
    T* to = at(cotangents_, layer.a);
    for (int64_t p = 0; p < n.positions; ++p) {
      if (layer.add_a)
        gemm<T, true>(n.in, width_, n.out, {w, n.column, n.row}, d, width_, to, width_);
      else
        gemm<T, false>(n.in, width_, n.out, {w, n.column, n.row}, d, width_, to, width_);
      if (gradient) {
        const bool outputs_first = n.column == 1;
        const T *left = outputs_first ? d : in, *right = outputs_first ? in : d;
        const int64_t rows = outputs_first ? n.out : n.in, columns = outputs_first ? n.in : n.out;
        const int64_t stride = padded<T>(columns);
        transpose<T>(columns, width_, right, width_, turned_, stride);
        gemm<T, true>(rows, stride, members_, {left, width_, 1}, turned_, stride, matrices_[layer.weight], stride);
        if (layer.bias >= 0) add_lanes(n.out, d, lanes_[layer.bias]);
      }
      in += n.in * width_;
      d += n.out * width_;
      to += n.in * width_;
    }
  }

  // ---- functions of one element -------------------------------------------------------------------------------------

  static Constants<T> constants(const Layer& layer) {
    return {splat(T(layer.c[0])), splat(T(layer.c[1])), splat(T(layer.c[2]))};
  }

  NODESHAPE_OUTLINE void unary(const Layer& layer, T* const* values) {
    const T* x = at(values, layer.a);
    T* out = at(values, layer.out);
    const Constants<T> k = constants(layer);
    with_unary(Unary(layer.function), [&]<Unary F>() {
      each_vector(layer.unary.count, [=, &k](int64_t i) { store(out + i, apply<F, T>(load(x + i), k)); });
    });
  }

  /// f' of vector i, from what a tape has of x and y = f(x).
  template <Unary F>
  static NODESHAPE_INLINE Vec<T> slope_at(const T* x, const T* y, int64_t i, const Constants<T>& k) {
    Vec<T> argument{}, value{};
    if constexpr (slope_reads_argument(F)) argument = load(x + i);
    if constexpr (slope_reads_value(F)) value = load(y + i);
    return slope<F, T>(argument, value, k);
  }

  NODESHAPE_OUTLINE void unary_vjp(const Layer& layer, T* const* values) {
    const T *x = at(values, layer.a), *y = at(values, layer.out), *d = at(cotangents_, layer.out);
    T* to = at(cotangents_, layer.a);
    const Constants<T> k = constants(layer);
    const bool add = layer.add_a;
    with_unary(Unary(layer.function), [&]<Unary F>() {
      if (add)
        each_vector(layer.unary.count,
                    [=, &k](int64_t i) { store(to + i, fma(load(d + i), slope_at<F>(x, y, i, k), load(to + i))); });
      else
        each_vector(layer.unary.count, [=, &k](int64_t i) { store(to + i, load(d + i) * slope_at<F>(x, y, i, k)); });
    });
  }

  // ---- rows chosen by strides ---------------------------------------------------------------------------------------

  /// An operand's rows: of a buffer, or a weight's elements, the same in all lanes.
  struct Operand {
    const T* data;
    bool is_weight;

    NODESHAPE_INLINE Vec<T> get(int64_t row, int64_t width, int64_t v) const {
      return is_weight ? splat(data[row]) : load(data + row * width + v);
    }
  };
  Operand operand(const Ref& ref, T* const* values) const {
    if (ref.is_weight()) return {weights_[ref.weight()] + ref.offset, true};
    return {at(values, ref), false};
  }

  /// Where the cotangent of an operand's row goes.
  struct Target {
    T* data;         // null where it is not wanted
    int64_t stride;  // from row to row
    bool is_weight, add;
  };
  Target target(const Ref& ref, bool add, bool gradient) const {
    if (ref.is_weight()) return {gradient ? lanes_[ref.weight()] + ref.offset * kWide : nullptr, kWide, true, true};
    return {at(cotangents_, ref), width_, false, add};
  }

  NODESHAPE_OUTLINE void binary(const Layer& layer, T* const* values) {
    const Operand a = operand(layer.a, values), b = operand(layer.b, values);
    T* out = at(values, layer.out);
    const int64_t width = width_;
    with_binary(Binary(layer.function), [&]<Binary F>() {
      each_run(layer.strides, [=](int64_t first, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
        T* to = out + first * width;
        if (!a.is_weight && !b.is_weight && sa == 1 && sb == 1) {
          const T *x = a.data + ra * width, *y = b.data + rb * width;
          for (int64_t i = 0, end = count * width; i < end; i += kWide)
            store(to + i, combine<F>(load(x + i), load(y + i)));
          return;
        }
        for (int64_t r = 0; r < count; ++r)
          for (int64_t v = 0; v < width; v += kWide)
            store(to + r * width + v, combine<F>(a.get(ra + r * sa, width, v), b.get(rb + r * sb, width, v)));
      });
    });
  }

  NODESHAPE_OUTLINE void binary_vjp(const Layer& layer, T* const* values, bool gradient) {
    const Operand a = operand(layer.a, values), b = operand(layer.b, values);
    const Target to_a = target(layer.a, layer.add_a, gradient), to_b = target(layer.b, layer.add_b, gradient);
    const T* d = at(cotangents_, layer.out);
    with_binary(Binary(layer.function), [&]<Binary F>() {
      each_run(layer.strides, [&](int64_t first, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
        const T* w = d + first * width_;
        if (to_a.data != nullptr)
          spread_rows(to_a, ra, sa, count, [=, this](int64_t r, int64_t v) {
            return to_first<F>(load(w + r * width_ + v), a.get(ra + r * sa, width_, v), b.get(rb + r * sb, width_, v));
          });
        if (to_b.data != nullptr)
          spread_rows(to_b, rb, sb, count, [=, this](int64_t r, int64_t v) {
            return to_second<F>(load(w + r * width_ + v), a.get(ra + r * sa, width_, v), b.get(rb + r * sb, width_, v));
          });
      });
    });
  }

  /// Rows row, row + step, ... of a target take body(r, v) for r < count.
  template <class Body>
  NODESHAPE_INLINE void spread_rows(const Target& to, int64_t row, int64_t step, int64_t count, Body&& body) const {
    for (int64_t r = 0; r < count; ++r) {
      T* rows = to.data + (row + r * step) * to.stride;
      if (to.is_weight) {
        Vec<T> sum = load(rows);
        for (int64_t v = 0; v < width_; v += kWide) sum += body(r, v);
        store(rows, sum);
      } else if (to.add) {
        for (int64_t v = 0; v < width_; v += kWide) store(rows + v, load(rows + v) + body(r, v));
      } else {
        for (int64_t v = 0; v < width_; v += kWide) store(rows + v, body(r, v));
      }
    }
  }

  // ---- move: out = c0 a, or c0 times sums of a, or the largest of some a --------------------------------------------

  NODESHAPE_OUTLINE void move(const Layer& layer, T* const* values) {
    if (layer.is_copy()) {
      const T* from = at(values, layer.a);
      T* to = at(values, layer.out);
      return each_vector(layer.strides.sizes[0], [=](int64_t i) { store(to + i, load(from + i)); });
    }
    const Operand a = operand(layer.a, values);
    T* out = at(values, layer.out);
    const Move how = Move(layer.function);
    const Vec<T> scale = splat(T(layer.c[0]));
    if (how != Move::copy) {  // whose places are dense
      int64_t rows = 1;
      for (int64_t d = 0; d < layer.strides.dims; ++d)
        if (layer.strides.b[d] != 0) rows *= layer.strides.sizes[d];
      const Vec<T> start = splat(how == Move::sum ? T(0) : -T(__builtin_inf()));
      each_vector(rows, [=](int64_t i) { store(out + i, start); });
    }
    each_run(layer.strides, [=, this](int64_t, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
      for (int64_t r = 0; r < count; ++r) {
        T* to = out + (rb + r * sb) * width_;
        for (int64_t v = 0; v < width_; v += kWide) {
          const Vec<T> x = scale * a.get(ra + r * sa, width_, v);
          if (how == Move::copy)
            store(to + v, x);
          else if (how == Move::sum)
            store(to + v, load(to + v) + x);
          else
            store(to + v, combine<Binary::maximum>(load(to + v), x));
        }
      }
    });
  }

  NODESHAPE_OUTLINE void move_vjp(const Layer& layer, bool gradient) {
    if (layer.is_copy()) {
      const T* d = at(cotangents_, layer.out);
      T* to = at(cotangents_, layer.a);
      if (layer.add_a)
        each_vector(layer.strides.sizes[0], [=](int64_t i) { store(to + i, load(to + i) + load(d + i)); });
      else
        each_vector(layer.strides.sizes[0], [=](int64_t i) { store(to + i, load(d + i)); });
      return;
    }
    const Target to = target(layer.a, layer.add_a, gradient);
    if (to.data == nullptr) return;
    const T* d = at(cotangents_, layer.out);
    const Vec<T> scale = splat(T(layer.c[0]));
    each_run(layer.strides, [=, this](int64_t, int64_t ra, int64_t rb, int64_t count, int64_t sa, int64_t sb) {
      spread_rows(to, ra, sa, count,
                  [=, this](int64_t r, int64_t v) { return scale * load(d + (rb + r * sb) * width_ + v); });
    });
  }

  // ---- norm: (a - mean) / sqrt(variance + c0) of each group, then scale and shift -----------------------------------

  NODESHAPE_OUTLINE void norm(const Layer& layer, T* const* values) {
    const auto& n = layer.norm;
    const T *in = at(values, layer.a), *w = weight(layer.weight), *bias = weight(layer.bias);
    T *out = at(values, layer.out), *kept = values[layer.scratch];
    const Vec<T> share = splat(T(1) / T(n.size)), eps = splat(T(layer.c[0])), one = splat(T(1));
    for (int64_t g = 0; g < n.groups; ++g)
      for (int64_t v = 0; v < width_; v += kWide) {
        const T* x = in + g * n.size * width_ + v;
        T* y = out + g * n.size * width_ + v;
        const Vec<T> mean = rows_sum(n.size, [=, this](int64_t r) { return load(x + r * width_); }) * share;
        const Vec<T> variance = rows_sum(n.size,
                                         [=, this](int64_t r) {
                                           const Vec<T> c = load(x + r * width_) - mean;
                                           return c * c;
                                         }) *
                                share;
        const Vec<T> inverse = one / root_of_lanes(Vec<T>(variance + eps));
        store(kept + 2 * g * width_ + v, mean);
        store(kept + (2 * g + 1) * width_ + v, inverse);
        each_channel(n.size, g * n.size, n.inner, n.count, [&](int64_t r, int64_t end, int64_t c) {
          const Vec<T> scale = w == nullptr ? inverse : inverse * splat(w[c]);
          const Vec<T> shift = bias == nullptr ? Vec<T>{} : splat(bias[c]);
          for (; r < end; ++r) store(y + r * width_, fma(load(x + r * width_) - mean, scale, shift));
        });
      }
  }

  NODESHAPE_OUTLINE void norm_vjp(const Layer& layer, T* const* values, bool gradient) {
    const auto& n = layer.norm;
    const T *in = at(values, layer.a), *w = weight(layer.weight), *kept = values[layer.scratch];
    const T* cotangent = at(cotangents_, layer.out);
    T* to = at(cotangents_, layer.a);
    T* to_w = gradient && layer.weight >= 0 ? lanes_[layer.weight] : nullptr;
    T* to_bias = gradient && layer.bias >= 0 ? lanes_[layer.bias] : nullptr;
    const Vec<T> share = splat(T(1) / T(n.size));
    for (int64_t g = 0; g < n.groups; ++g)
      for (int64_t v = 0; v < width_; v += kWide) {
        const T *x = in + g * n.size * width_ + v, *d = cotangent + g * n.size * width_ + v;
        T* dx = to + g * n.size * width_ + v;
        const Vec<T> mean = load(kept + 2 * g * width_ + v), inverse = load(kept + (2 * g + 1) * width_ + v);
        Vec<T> plain{}, along{};  // sums of the scaled cotangent, and of it times the normalised value
        each_channel(n.size, g * n.size, n.inner, n.count, [&](int64_t r, int64_t end, int64_t c) {
          Vec<T> own{}, own_along{};
          for (; r < end; ++r) {
            const Vec<T> z = load(d + r * width_);
            own += z;
            own_along = fma(z, (load(x + r * width_) - mean) * inverse, own_along);
          }
          if (to_bias != nullptr) store(to_bias + c * kWide, load(to_bias + c * kWide) + own);
          if (to_w != nullptr) store(to_w + c * kWide, load(to_w + c * kWide) + own_along);
          const Vec<T> scale = w == nullptr ? splat(T(1)) : splat(w[c]);
          plain = fma(own, scale, plain);
          along = fma(own_along, scale, along);
        });
        plain *= share;
        along *= share;
        each_channel(n.size, g * n.size, n.inner, n.count, [&](int64_t r, int64_t end, int64_t c) {
          const Vec<T> scale = w == nullptr ? splat(T(1)) : splat(w[c]);
          for (; r < end; ++r) {
            const Vec<T> unit = (load(x + r * width_) - mean) * inverse;
            const Vec<T> dz = inverse * (load(d + r * width_) * scale - plain - unit * along);
            store(dx + r * width_, layer.add_a ? load(dx + r * width_) + dz : dz);
          }
        });
      }
  }

  /// The sum of body(r) for r < count, by four running sums.
  template <class Body>
  static NODESHAPE_INLINE Vec<T> rows_sum(int64_t count, Body&& body) {
    Vec<T> s0{}, s1{}, s2{}, s3{};
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) {
      s0 += body(r);
      s1 += body(r + 1);
      s2 += body(r + 2);
      s3 += body(r + 3);
    }
    for (; r < count; ++r) s0 += body(r);
    return (s0 + s1) + (s2 + s3);
  }

  // ---- conv ---------------------------------------------------------------------------------------------------------

  struct ConvPlan {
    bool framed;                        // whether forward reads a copy with a frame of zeros
    int64_t height, columns, row;       // of the output, in lanes; elements of a row of the (framed) input
    int64_t back_height, back_columns;  // of the input, as the backward pass goes through it
    bool back_framed;
    int64_t back_row;
    Taps forward, backward;  // within a group
    Winograd<T>** fast;      // of each group, or null
    Winograd<T>** fast_back;
  };

  static bool pays(const Layer& layer, int64_t out_y, int64_t out_x) {
    const auto& n = layer.conv;
    return n.kernel_height == 3 && n.kernel_width == 3 && n.dilation_height == 1 && n.dilation_width == 1 &&
           map_of(layer, out_y, out_x).pays() && back_map_of(layer, out_y, out_x).pays();
  }
  static WinogradMap map_of(const Layer& layer, int64_t out_y, int64_t out_x) {
    const auto& n = layer.conv;
    return {n.in / n.groups, n.out / n.groups, n.height, n.width, n.pad_height, n.pad_width, out_y, out_x};
  }
  static WinogradMap back_map_of(const Layer& layer, int64_t out_y, int64_t out_x) {
    const auto& n = layer.conv;
    return {n.out / n.groups, n.in / n.groups, out_y, out_x, 2 - n.pad_height, 2 - n.pad_width, n.height, n.width};
  }
  /// Whether a buffer is the frame of a convolution that goes without.
  static bool is_idle_frame(const Program& p, int64_t buffer) {
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const Layer& layer = p.layers[l];
      if (layer.kind != LayerKind::conv || layer.scratch != buffer) continue;
      const ConvSizes c = conv_sizes(layer);
      return pays(layer, c.out_y, c.out_x);
    }
    return false;
  }

  void plan_convolutions(Arena& arena) {
    plans_ = arena.take<ConvPlan>(p_.layer_count);
    for (int64_t l = 0; l < p_.layer_count; ++l) {
      const Layer& layer = p_.layers[l];
      if (layer.kind != LayerKind::conv) continue;
      const auto& n = layer.conv;
      ConvPlan& plan = plans_[l];
      plan.fast = plan.fast_back = nullptr;
      const ConvSizes c = conv_sizes(layer);
      const bool flat = n.kernel_height * n.kernel_width == 1 && c.in_y == n.height && c.in_x == n.width;
      plan.framed = c.in_y > n.height || c.in_x > n.width;
      plan.height = flat ? 1 : c.out_y;
      plan.columns = c.out_y * c.out_x * width_ / plan.height;
      plan.row = c.in_x * width_;
      plan.back_framed = c.top > 0 || c.side > 0;
      plan.back_height = flat ? 1 : n.height;
      plan.back_columns = n.height * n.width * width_ / plan.back_height;
      plan.back_row = c.back_x * width_;
      plan.forward = forward_taps(layer, c, width_, arena);
      plan_winograd(layer, c.out_y, c.out_x, arena, plan);
      if (with_gradient_) plan.backward = backward_taps(layer, c, width_, arena);
    }
  }

  void plan_winograd(const Layer& layer, int64_t out_y, int64_t out_x, Arena& arena, ConvPlan& plan) {
    const auto& n = layer.conv;
    if (!pays(layer, out_y, out_x)) return;
    const WinogradMap map = map_of(layer, out_y, out_x), back = back_map_of(layer, out_y, out_x);
    const int64_t in = map.in, out = map.out;
    plan.fast = arena.take<Winograd<T>*>(n.groups);
    if (with_gradient_) plan.fast_back = arena.take<Winograd<T>*>(n.groups);
    for (int64_t g = 0; g < n.groups; ++g) {
      const T* w = weight(layer.weight) + g * out * in * 9;
      plan.fast[g] = new (arena.take<Winograd<T>>(1)) Winograd<T>(
          map, width_, arena, with_gradient_, [=](int64_t o, int64_t i, int tap) { return w[(o * in + i) * 9 + tap]; });
      if (with_gradient_)
        plan.fast_back[g] = new (arena.take<Winograd<T>>(1)) Winograd<T>(
            back, width_, arena, false, [=](int64_t i, int64_t o, int tap) { return w[(o * in + i) * 9 + 8 - tap]; });
    }
  }

  NODESHAPE_OUTLINE void conv(const Layer& layer, T* const* values, const ConvPlan& plan) {
    const auto& n = layer.conv;
    const T *w = weight(layer.weight), *bias = weight(layer.bias), *in = at(values, layer.a);
    T* out = at(values, layer.out);
    int64_t map = n.height * n.width * width_;
    if (plan.fast != nullptr) {
      const int64_t own_out = n.out / n.groups;
      for (int64_t g = 0; g < n.groups; ++g)
        plan.fast[g]->convolve(in + g * (n.in / n.groups) * map, bias == nullptr ? nullptr : bias + g * own_out, false,
                               out + g * own_out * plan.height * plan.columns);
      return;
    }
    if (plan.framed) {
      T* framed = values[layer.scratch];
      frame<T>(n.in, n.height, n.width * width_, n.pad_height, n.pad_width * width_, in, framed);
      in = framed;
      map = (n.height + 2 * n.pad_height) * (n.width + 2 * n.pad_width) * width_;
    }
    const int64_t own_in = n.in / n.groups, own_out = n.out / n.groups;
    for (int64_t g = 0; g < n.groups; ++g)
      convolve<T>(own_out, plan.height, plan.columns, plan.forward, w + g * own_out * plan.forward.w_row,
                  in + g * own_in * map, plan.row, bias == nullptr ? nullptr : bias + g * own_out, false,
                  out + g * own_out * plan.height * plan.columns);
  }

  NODESHAPE_OUTLINE void conv_vjp(const Layer& layer, T* const* values, const ConvPlan& plan, bool gradient) {
    const auto& n = layer.conv;
    const int64_t own_in = n.in / n.groups, own_out = n.out / n.groups;
    const int64_t out_map = plan.height * plan.columns, in_map = n.height * n.width * width_;
    const T *w = weight(layer.weight), *d = at(cotangents_, layer.out);
    T* to = at(cotangents_, layer.a);
    if (gradient && layer.bias >= 0)
      for (int64_t o = 0; o < n.out; ++o) {
        T* sum = lanes_[layer.bias] + o * kWide;
        store(sum, load(sum) + rows_sum(out_map / kWide, [=](int64_t r) { return load(d + o * out_map + r * kWide); }));
      }
    if (plan.fast != nullptr) {
      for (int64_t g = 0; g < n.groups; ++g) {
        const T* own = d + g * own_out * out_map;
        if (gradient) plan.fast[g]->weight_gradient(at(values, layer.a) + g * own_in * in_map, own);
        plan.fast_back[g]->convolve(own, nullptr, layer.add_a, to + g * own_in * in_map);
      }
      return;
    }
    if (gradient) {
      const T* in = plan.framed ? values[layer.scratch] : at(values, layer.a);
      const int64_t map = plan.framed ? (n.height + 2 * n.pad_height) * (n.width + 2 * n.pad_width) * width_ : in_map;
      const int64_t weights = own_out * plan.forward.depth;
      for (int64_t g = 0; g < n.groups; ++g)
        convolve_products<T>(own_out, plan.height, plan.columns, plan.forward, d + g * own_out * out_map,
                             in + g * own_in * map, plan.row, lanes_[layer.weight] + g * weights * kWide);
    }
    int64_t back_map = out_map;
    if (plan.back_framed) {
      const ConvSizes c = conv_sizes(layer);
      frame<T>(n.out, c.out_y, c.out_x * width_, c.top, c.side * width_, d, scratch_);
      d = scratch_;
      back_map = c.back_y * plan.back_row;
    }
    for (int64_t g = 0; g < n.groups; ++g)
      convolve<T>(own_in, plan.back_height, plan.back_columns, plan.backward, w + g * own_out * plan.forward.w_row,
                  d + g * own_out * back_map, plan.back_row, nullptr, layer.add_a, to + g * own_in * in_map);
  }

  // ---- matmul: out[i, r, c] = sum_k a[i, r, k] b[i, k, c] -----------------------------------------------------------

  NODESHAPE_OUTLINE void matmul(const Layer& layer, T* const* values) {
    const auto& n = layer.matmul;
    const Operand a = operand(layer.a, values), b = operand(layer.b, values);
    T* out = at(values, layer.out);
    for (int64_t i = 0; i < n.batch; ++i)
      for (int64_t r = 0; r < n.rows; ++r)
        for (int64_t c = 0; c < n.columns; ++c, out += width_)
          for (int64_t v = 0; v < width_; v += kWide) {
            Vec<T> sum{};
            for (int64_t k = 0; k < n.depth; ++k)
              sum = fma(a.get(i * n.a[0] + r * n.a[1] + k * n.a[2], width_, v),
                        b.get(i * n.b[0] + k * n.b[1] + c * n.b[2], width_, v), sum);
            store(out + v, sum);
          }
  }

  NODESHAPE_OUTLINE void matmul_vjp(const Layer& layer, T* const* values, bool gradient) {
    const auto& n = layer.matmul;
    const Operand a = operand(layer.a, values), b = operand(layer.b, values);
    const Target to_a = target(layer.a, true, gradient), to_b = target(layer.b, true, gradient);
    const T* d = at(cotangents_, layer.out);
    for (int64_t i = 0; i < n.batch; ++i)
      for (int64_t r = 0; r < n.rows; ++r)
        for (int64_t c = 0; c < n.columns; ++c, d += width_)
          for (int64_t k = 0; k < n.depth; ++k) {
            const int64_t ra = i * n.a[0] + r * n.a[1] + k * n.a[2], rb = i * n.b[0] + k * n.b[1] + c * n.b[2];
            if (to_a.data != nullptr)
              spread_rows(to_a, ra, 0, 1, [=, this](int64_t, int64_t v) { return load(d + v) * b.get(rb, width_, v); });
            if (to_b.data != nullptr)
              spread_rows(to_b, rb, 0, 1, [=, this](int64_t, int64_t v) { return load(d + v) * a.get(ra, width_, v); });
          }
  }

  const Program& p_;
  const T* const* weights_;
  const int64_t width_;
  int64_t members_;
  const bool with_gradient_;
  T** values_;                 // [tapes, buffers]
  int64_t* places_ = nullptr;  // [buffers], in a tape that is attached
  int64_t tape_ = 0;
  ConvPlan* plans_;
  T** cotangents_ = nullptr;  // [buffers]
  T* scratch_ = nullptr;
  T** lanes_ = nullptr;     // [weights] of [elements, lanes]
  T** matrices_ = nullptr;  // [weights] of [rows, padded columns]
  T* turned_ = nullptr;     // one side of a linear layer's products, a sample per row
};

}  // namespace nodeshape::NODESHAPE_TARGET
