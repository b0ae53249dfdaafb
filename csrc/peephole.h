// Programs that a kernel of their own computes faster than layer by layer, known by their layers. Host code.
#pragma once

#include <algorithm>

#include "model.h"
#include "program.h"

namespace nodeshape {

/// Goes through a program's layers for as long as they are the expected ones.
class Peephole {
 public:
  explicit Peephole(const Program& program) : program_(program) {}

  /// ConvDynamics, its parameters still missing; without channels if the program is another one.
  ConvModel conv() {
    const Layer* first = program_.layer_count > 0 ? program_.layers : nullptr;
    if (first == nullptr || first->kind != LayerKind::norm || first->norm.size % first->norm.inner != 0) return {};
    const int64_t channels = first->norm.count, pixels = first->norm.inner;
    if (channels * pixels != program_.state()) return {};
    norm(channels, pixels);
    int64_t height = 0, width = 0;
    for (int l = 0; l < 2; ++l) {
      relu(channels * pixels);
      behind_time(channels, pixels);
      const Layer* layer = next(LayerKind::conv);
      if (layer == nullptr) return {};
      const auto& n = layer->conv;
      height = n.height;
      width = n.width;
      const int64_t wanted[] = {channels + 1, height, width, channels, 3, 3, 1, 1, 1, 1, 1};
      expect(std::equal(std::begin(wanted), std::end(wanted), layer->n) && height * width == pixels);
      weights_of(*layer);
      norm(channels, pixels);
    }
    const bool found = good_ && layer_ == program_.layer_count && value_ == program_.result && weight_ == 10;
    return found ? ConvModel{channels, height, width, groups_of(channels), {}} : ConvModel{};
  }

 private:
  static int64_t groups_of(int64_t channels) { return std::min<int64_t>(32, channels); }

  void expect(bool good) { good_ = good_ && good; }

  /// The next layer, which reads the value before it and whose result is the next value.
  const Layer* next(LayerKind kind) {
    const Layer* layer = layer_ < program_.layer_count ? program_.layers + layer_ : nullptr;
    expect(layer != nullptr && layer->kind == kind && layer->a.buffer == value_ && layer->a.offset == 0 &&
           layer->out.offset == 0);
    if (!good_) return nullptr;
    ++layer_;
    value_ = layer->out.buffer;
    return layer;
  }

  /// Weight and bias are the next two.
  void weights_of(const Layer& layer) {
    expect(layer.weight == weight_ && layer.bias == weight_ + 1);
    weight_ += 2;
  }

  void norm(int64_t channels, int64_t pixels) {
    const Layer* layer = next(LayerKind::norm);
    if (layer == nullptr) return;
    const auto& n = layer->norm;
    const int64_t groups = groups_of(channels);
    expect(channels % groups == 0 && n.groups == groups && n.size == channels / groups * pixels && n.inner == pixels &&
           n.count == channels && layer->c[0] == 1e-5);
    weights_of(*layer);
  }

  void relu(int64_t elements) {
    const Layer* layer = next(LayerKind::unary);
    expect(layer != nullptr && Unary(layer->function) == Unary::relu && layer->unary.count == elements);
  }

  /// Copies of dense elements: of the time to all pixels of a channel, perhaps by way of another buffer, and of the
  /// value to the channels behind.
  void behind_time(int64_t channels, int64_t pixels) {
    const int64_t value = value_;
    value_ = 1;
    copy(pixels, 0, 0);
    expect(value_ != value);  // which is still to be read
    if (good_ && layer_ < program_.layer_count && program_.layers[layer_].a.buffer == value_) copy(pixels, 1, 0);
    const int64_t joined = value_;
    value_ = value;
    copy(channels * pixels, 1, pixels);
    expect(value_ == joined && joined != value && program_.buffers[joined].size == (channels + 1) * pixels);
  }

  void copy(int64_t elements, int64_t stride, int64_t to) {
    const Layer* layer = layer_ < program_.layer_count ? program_.layers + layer_ : nullptr;
    expect(layer != nullptr && layer->kind == LayerKind::move && layer->a.buffer == value_ && layer->a.offset == 0 &&
           Move(layer->function) == Move::copy && layer->c[0] == 1 && layer->out.offset == to);
    if (!good_) return;
    const Strides& n = layer->strides;
    expect(elements == 1 ? n.dims == 1 && n.sizes[0] == 1
                         : n.dims == 1 && n.sizes[0] == elements && n.a[0] == stride && n.b[0] == 1);
    ++layer_;
    value_ = layer->out.buffer;
  }

  const Program& program_;
  bool good_ = true;
  int64_t layer_ = 0, value_ = 0, weight_ = 0;
};

}  // namespace nodeshape
