// A program as the ops get it, a row of integers: checked, and its buffers given places in memory. Host code.
//
//     [format, buffers, layers, result, weights, constants]  sizes of the buffers  layers, kLayerRecord integers each:
//     kind, function, a, its offset, b, its offset, out, its offset, scratch, weight, bias, first constant, numbers
#pragma once

#include <algorithm>
#include <vector>

#include "peephole.h"
#include "program.h"
#include "sizes.h"

namespace nodeshape {

inline constexpr int64_t kProgramFormat = 1;
inline constexpr int64_t kProgramHeader = 6;
inline constexpr int64_t kLayerHeader = 12;
inline constexpr int64_t kLayerRecord = kLayerHeader + kLayerNumbers;

class ProgramPlan {
 public:
  /// `sizes` are the numbers of elements of the weights.
  ProgramPlan(const int64_t* code, int64_t length, const double* constants, int64_t constant_count,
              const std::vector<int64_t>& sizes) {
    check(length >= kProgramHeader && code[0] == kProgramFormat, "it is of another version");
    const int64_t buffers = code[1], layers = code[2], result = code[3];
    check(buffers >= 2 && layers >= 0 && buffers <= kMost && layers <= kMost &&
              length == kProgramHeader + buffers + layers * kLayerRecord,
          "its length does not fit its header");
    check(code[4] == int64_t(sizes.size()),
          "it is for " + std::to_string(code[4]) + " weights, got " + std::to_string(sizes.size()));
    check(code[5] == constant_count, "it is for another number of constants");
    for (int64_t b = 0; b < buffers; ++b) {
      const int64_t size = code[kProgramHeader + b];
      check(size >= 0 && size <= kMostElements, "a buffer is too large");
      buffers_.push_back({size, 0, 0, 0, false});
    }
    check(buffers_[1].size == 1, "time is one element");
    check(result >= 2 && result < buffers && buffers_[result].size == buffers_[0].size,
          "its result is no buffer of the state's size");
    for (int64_t size : sizes) weights_.push_back({size, 0, 0, false});
    program_.result = result;
    for (int64_t l = 0; l < layers; ++l)
      read(code + kProgramHeader + buffers + l * kLayerRecord, constants, constant_count);
    place();
    plan_cotangents();
    note_what_is_read();
    program_.buffer_count = buffers;
    program_.layer_count = layers;
    program_.weight_count = int64_t(weights_.size());
    program_.buffers = buffers_.data();
    program_.layers = layers_.data();
    program_.weights = weights_.data();
    program_.conv = Peephole(program_).conv();
  }
  ProgramPlan(const ProgramPlan&) = delete;
  ProgramPlan& operator=(const ProgramPlan&) = delete;

  const Program& program() const { return program_; }

 private:
  static constexpr int64_t kMost = 1 << 20;
  static constexpr int64_t kMostElements = int64_t(1) << 36;

  static void check(bool good, const std::string& why) {
    if (!good) throw std::runtime_error("program: " + why);
  }

  int64_t size_of(const Ref& ref) const {
    return ref.is_weight() ? weights_[ref.weight()].size : buffers_[ref.buffer].size;
  }
  void check_ref(const Ref& ref, bool may_be_weight) const {
    check(ref.buffer < int64_t(buffers_.size()) && ref.offset >= 0 && ref.offset <= kMostElements,
          "a reference is outside its buffers");
    check(!ref.is_weight() || (may_be_weight && ref.weight() < int64_t(weights_.size())),
          "a reference is to a weight that there is not, or may not be");
  }
  void check_span(const Ref& ref, int64_t elements) const {
    check(elements >= 0 && elements <= kMostElements && ref.offset + elements <= size_of(ref),
          "a layer reaches beyond its buffer");
  }
  static int64_t product(std::initializer_list<int64_t> numbers) {
    int64_t total = 0;
    check(std::all_of(numbers.begin(), numbers.end(), [](int64_t x) { return x >= 0 && x <= kMostElements; }) &&
              multiply(Sizes(numbers), 1, &total) && total <= kMostElements,
          "a layer is too large");
    return total;
  }
  void check_strided(const Ref& ref, int64_t dims, const int64_t* sizes, const int64_t* strides) const {
    int64_t last = 0;
    for (int64_t d = 0; d < dims; ++d) {
      check(sizes[d] >= 1 && sizes[d] <= kMostElements && strides[d] >= 0 && strides[d] <= kMostElements,
            "a layer's strides are out of their range");
      last += product({sizes[d] - 1, strides[d]});
    }
    check_span(ref, last + 1);
  }
  void check_weight(int64_t weight, int64_t size, bool optional) const {
    if (optional && weight == -1) return;
    check(weight >= 0 && weight < int64_t(weights_.size()) && weights_[weight].size == size,
          "a layer's weight is of another size");
  }

  void read(const int64_t* code, const double* constants, int64_t constant_count) {
    Layer layer{};
    check(code[0] >= 0 && code[0] < kLayerKinds, "a layer is of an unknown kind");
    layer.kind = LayerKind(code[0]);
    layer.function = code[1];
    layer.a = {code[2], code[3]};
    layer.b = {code[4], code[5]};
    layer.out = {code[6], code[7]};
    layer.scratch = code[8];
    layer.weight = code[9];
    layer.bias = code[10];
    check(code[11] >= 0 && code[11] <= constant_count - kLayerConstants, "a layer's constants are missing");
    std::copy_n(constants + code[11], kLayerConstants, layer.c);
    std::copy_n(code + kLayerHeader, kLayerNumbers, layer.n);
    check_ref(layer.out, false);
    check(layer.out.buffer >= 2, "a layer writes the state or the time");
    check(layer.scratch == -1 || (layer.scratch >= 2 && layer.scratch < int64_t(buffers_.size())),
          "a layer's scratch is no buffer");
    switch (layer.kind) {
      case LayerKind::linear: {
        const auto& n = layer.linear;
        check_ref(layer.a, false);
        check_span(layer.a, product({n.positions, n.in}));
        check_span(layer.out, product({n.positions, n.out}));
        check_weight(layer.weight, product({n.in, n.out}), false);
        check_weight(layer.bias, n.out, true);
        check((n.row == n.in && n.column == 1) || (n.row == 1 && n.column == n.out), "a matrix is not dense");
        const bool outputs_first = n.column == 1;
        WeightUse& use = weights_[layer.weight];
        const int64_t rows = outputs_first ? n.out : n.in;
        check(use.rows == 0 || use.rows == rows, "a matrix is used in two shapes");
        use.rows = rows;
        use.columns = outputs_first ? n.in : n.out;
        if (layer.bias >= 0) weights_[layer.bias].lanes = true;
        program_.operations += double(product({n.positions, n.in, n.out}));
        break;
      }
      case LayerKind::unary:
        check(layer.function >= 0 && layer.function < kUnaries, "a function is unknown");
        check_ref(layer.a, false);
        check_span(layer.a, layer.unary.count);
        check_span(layer.out, layer.unary.count);
        program_.operations += 8.0 * double(layer.unary.count);
        break;
      case LayerKind::binary:
      case LayerKind::move: {
        const Strides& n = layer.strides;
        check(n.dims >= 1 && n.dims <= kMostDims, "a layer has too many dimensions");
        check_ref(layer.a, true);
        check_strided(layer.a, n.dims, n.sizes, n.a);
        if (layer.a.is_weight()) weights_[layer.a.weight()].lanes = true;
        int64_t elements;
        check(multiply(Sizes(n.sizes, n.sizes + n.dims), 1, &elements), "a layer is too large");
        if (layer.kind == LayerKind::binary) {
          check(layer.function >= 0 && layer.function < kBinaries, "a function is unknown");
          check_ref(layer.b, true);
          check_strided(layer.b, n.dims, n.sizes, n.b);
          if (layer.b.is_weight()) weights_[layer.b.weight()].lanes = true;
          check_span(layer.out, elements);
        } else {
          check(layer.function >= 0 && layer.function < kMoves, "a function is unknown");
          check_strided(layer.out, n.dims, n.sizes, n.b);
          int64_t rows = 1;  // that several elements go to
          for (int64_t d = 0; d < n.dims; ++d)
            if (n.b[d] != 0) rows *= n.sizes[d];
          if (Move(layer.function) != Move::copy) check_span(layer.out, rows);
        }
        program_.operations += double(elements);
        break;
      }
      case LayerKind::norm: {
        const auto& n = layer.norm;
        check_ref(layer.a, false);
        const int64_t elements = product({n.groups, n.size});
        check(n.inner >= 1 && n.count >= 1 && n.size >= 1, "a norm is empty");
        check_span(layer.a, elements);
        check_span(layer.out, elements);
        check_weight(layer.weight, n.count, true);
        check_weight(layer.bias, n.count, true);
        check(layer.scratch >= 0 && buffers_[layer.scratch].size >= product({n.groups, 2}), "a norm has no scratch");
        for (int64_t k : {layer.weight, layer.bias})
          if (k >= 0) weights_[k].lanes = true;
        program_.operations += 6.0 * double(elements);
        break;
      }
      case LayerKind::conv: {
        const auto& n = layer.conv;
        check_ref(layer.a, false);
        check(n.in >= 1 && n.out >= 1 && n.groups >= 1 && n.in % n.groups == 0 && n.out % n.groups == 0 &&
                  n.height >= 1 && n.height <= kMostElements && n.width >= 1 && n.width <= kMostElements &&
                  n.kernel_height >= 1 && n.kernel_width >= 1 && n.dilation_height >= 1 && n.dilation_width >= 1 &&
                  n.pad_height >= 0 && n.pad_width >= 0,
              "a convolution's sizes are out of their range");
        const int64_t reach_height = product({n.dilation_height, n.kernel_height - 1}),
                      reach_width = product({n.dilation_width, n.kernel_width - 1});
        check(n.pad_height <= reach_height && n.pad_width <= reach_width, "a convolution is padded beyond its kernel");
        const int64_t framed_height = n.height + 2 * n.pad_height, framed_width = n.width + 2 * n.pad_width;
        const int64_t out_height = framed_height - reach_height, out_width = framed_width - reach_width;
        check(out_height >= 1 && out_width >= 1, "a convolution has no output");
        check_span(layer.a, product({n.in, n.height, n.width}));
        check_span(layer.out, product({n.out, out_height, out_width}));
        check_weight(layer.weight, product({n.out, n.in / n.groups, n.kernel_height, n.kernel_width}), false);
        check_weight(layer.bias, n.out, true);
        if (n.pad_height > 0 || n.pad_width > 0)
          check(layer.scratch >= 0 && buffers_[layer.scratch].size >= product({n.in, framed_height, framed_width}),
                "a convolution has no scratch");
        if (layer.bias >= 0) weights_[layer.bias].lanes = true;
        program_.scratch = std::max(program_.scratch, product({n.out, n.height + reach_height, n.width + reach_width}));
        program_.operations += double(product({n.out, n.in / n.groups, n.kernel_height, n.kernel_width})) *
                               double(product({out_height, out_width}));
        break;
      }
      case LayerKind::matmul: {
        const auto& n = layer.matmul;
        check_ref(layer.a, true);
        check_ref(layer.b, true);
        const int64_t a_sizes[3] = {n.batch, n.rows, n.depth}, b_sizes[3] = {n.batch, n.depth, n.columns};
        check_strided(layer.a, 3, a_sizes, n.a);
        check_strided(layer.b, 3, b_sizes, n.b);
        check_span(layer.out, product({n.batch, n.rows, n.columns}));
        for (const Ref& ref : {layer.a, layer.b})
          if (ref.is_weight()) weights_[ref.weight()].lanes = true;
        program_.operations += double(product({n.batch, n.rows, n.columns, n.depth}));
        break;
      }
    }
    check(layer.a.buffer != program_.result && (!has_b(layer) || layer.b.buffer != program_.result),
          "a layer reads the result");
    layers_.push_back(layer);
  }

  static bool has_b(const Layer& layer) { return layer.kind == LayerKind::binary || layer.kind == LayerKind::matmul; }

  /// Places for spans of time [from, to] of buffers of some sizes, first fit; returns the memory they take together.
  struct Span {
    int64_t buffer, from, to;
  };
  int64_t pack(const std::vector<Span>& spans, int64_t Buffer::* place) {
    std::vector<Span> placed;
    int64_t total = 0;
    for (const Span& span : spans) {
      Buffer& buffer = buffers_[span.buffer];
      int64_t at = 0;
      bool moved = true;
      while (moved) {
        moved = false;
        for (const Span& other : placed) {
          const Buffer& there = buffers_[other.buffer];
          if (other.to < span.from || span.to < other.from) continue;
          if (at < there.*place + there.size && there.*place < at + buffer.size) {
            at = there.*place + there.size;
            moved = true;
          }
        }
      }
      buffer.*place = at;
      total = std::max(total, at + buffer.size);
      placed.push_back(span);
    }
    return total;
  }

  void place() {
    const int64_t count = int64_t(buffers_.size()), layers = int64_t(layers_.size());
    std::vector<int64_t> first(count, layers), last(count, -1);
    for (int64_t l = 0; l < layers; ++l) {
      const Layer& layer = layers_[l];
      const auto touch = [&](int64_t buffer) {
        if (buffer < 0) return;
        first[buffer] = std::min(first[buffer], l);
        last[buffer] = std::max(last[buffer], l);
      };
      touch(layer.a.buffer);
      if (has_b(layer)) touch(layer.b.buffer);
      touch(layer.out.buffer);
      touch(layer.scratch);
    }
    std::vector<Span> spans;
    for (int64_t b = 1; b < count; ++b) {
      if (b == program_.result) continue;
      buffers_[b].kept = program_.kept;
      program_.kept += buffers_[b].size;
      spans.push_back({b, b == 1 ? 0 : first[b], b == 1 ? layers : last[b]});
    }
    program_.brief = pack(spans, &Buffer::brief);
  }

  /// Go through the layers backwards and note who is the first to write each cotangent.
  void plan_cotangents() {
    const int64_t count = int64_t(buffers_.size()), layers = int64_t(layers_.size());
    std::vector<bool> touched(count, false);
    std::vector<int64_t> from(count, layers), to(count, layers);
    touched[program_.result] = true;
    for (int64_t l = layers - 1; l >= 0; --l) {
      Layer& layer = layers_[l];
      layer.live = touched[layer.out.buffer];
      from[layer.out.buffer] = std::min(from[layer.out.buffer], l);
      layer.live = layer.live && !(layer.kind == LayerKind::move && Move(layer.function) == Move::largest);
      if (!layer.live) continue;
      const bool broadcast_a = layer.kind == LayerKind::matmul || (is_strided(layer) && !dense(layer, layer.strides.a)),
                 broadcast_b = layer.kind == LayerKind::matmul || (is_strided(layer) && !dense(layer, layer.strides.b));
      const auto note = [&](const Ref& ref, bool partly, bool* zero, bool* add) {
        if (ref.is_weight()) return;
        const bool first = !touched[ref.buffer];
        *zero = first && (partly || ref.offset != 0 || reach(layer) != buffers_[ref.buffer].size);
        *add = !first || *zero;
        touched[ref.buffer] = true;
        if (first) to[ref.buffer] = l;
        from[ref.buffer] = std::min(from[ref.buffer], l);
      };
      note(layer.a, broadcast_a, &layer.zero_a, &layer.add_a);
      if (has_b(layer)) note(layer.b, broadcast_b, &layer.zero_b, &layer.add_b);
    }
    program_.zero_state = !touched[0];
    std::vector<Span> spans;
    for (int64_t b = 1; b < count; ++b) {
      if (b == program_.result || !touched[b]) continue;
      spans.push_back({b, b == 1 ? -1 : from[b], to[b]});
    }
    std::sort(spans.begin(), spans.end(), [](const Span& x, const Span& y) { return x.to > y.to; });
    program_.cotangents = pack(spans, &Buffer::cotangent);
    program_.uses_time = touched[1];
  }

  /// Note the buffers whose values a vjp looks at.
  void note_what_is_read() {
    const auto read = [&](const Ref& ref) {
      if (!ref.is_weight()) buffers_[ref.buffer].read = true;
    };
    for (const Layer& layer : layers_) {
      if (!layer.live) continue;
      switch (layer.kind) {
        case LayerKind::linear:
        case LayerKind::norm:
        case LayerKind::conv:
          read(layer.a);
          if (layer.scratch >= 0) buffers_[layer.scratch].read = true;
          break;
        case LayerKind::unary:
          if (slope_reads_argument(Unary(layer.function))) read(layer.a);
          if (slope_reads_value(Unary(layer.function))) read(layer.out);
          break;
        case LayerKind::binary:
          if (Binary(layer.function) == Binary::add || Binary(layer.function) == Binary::subtract) break;
          [[fallthrough]];
        case LayerKind::matmul:
          read(layer.a);
          read(layer.b);
          break;
        case LayerKind::move:
          break;
      }
    }
  }

  static bool is_strided(const Layer& layer) {
    return layer.kind == LayerKind::binary || layer.kind == LayerKind::move;
  }
  /// Whether strides visit each element of a dense array once, in order.
  static bool dense(const Layer& layer, const int64_t* strides) {
    int64_t stride = 1;
    for (int64_t d = layer.strides.dims - 1; d >= 0; --d) {
      if (layer.strides.sizes[d] != 1 && strides[d] != stride) return false;
      stride *= layer.strides.sizes[d];
    }
    return true;
  }
  /// Elements of operand a (and b, where it is dense) that a layer reads.
  static int64_t reach(const Layer& layer) {
    switch (layer.kind) {
      case LayerKind::linear:
        return layer.linear.positions * layer.linear.in;
      case LayerKind::unary:
        return layer.unary.count;
      case LayerKind::norm:
        return layer.norm.groups * layer.norm.size;
      case LayerKind::conv:
        return layer.conv.in * layer.conv.height * layer.conv.width;
      default: {
        int64_t elements = 1;
        for (int64_t d = 0; d < layer.strides.dims; ++d) elements *= layer.strides.sizes[d];
        return layer.kind == LayerKind::matmul ? -1 : elements;
      }
    }
  }

  Program program_{};
  std::vector<Buffer> buffers_;
  std::vector<Layer> layers_;
  std::vector<WeightUse> weights_;
};

}  // namespace nodeshape
