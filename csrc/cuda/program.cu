// The CUDA solver of programs: layers and weights made ready, gradients put where they belong.
//
// Layers are calls, so the parts of the loops in time may be calls too, which leaves them registers enough.
#define NODESHAPE_OUTLINE NODESHAPE_CALL

#include "program.cuh"
#include "solve.cuh"
#include "../tableau.h"

#include <algorithm>
#include <limits>

namespace nodeshape::cuda {

/// The loops of a tableau, as the kernels run them.
struct TableauSteps {
  Tableau tableau;

  TableauSteps uploaded(const Launch& on) const {
    const int64_t stages = tableau.stages;
    Upload upload;
    for (int64_t i = 0; i < stages * stages; ++i) upload.add(tableau.a[i]);
    for (int64_t i = 0; i < stages; ++i) upload.add(tableau.b[i]);
    for (int64_t i = 0; i < stages; ++i) upload.add(tableau.c[i]);
    TableauSteps steps{tableau};
    steps.tableau.a = static_cast<const double*>(upload.to_device(on));
    steps.tableau.b = steps.tableau.a + stages * stages;
    steps.tableau.c = steps.tableau.b + stages;
    return steps;
  }

  template <class D>
  void take(D& f, Arena& arena, const ForwardProblem<typename D::Scalar>& problem) const {
    const TableauSolve<D, Arena> solve(f, arena, problem, tableau, Group{0, 1});
  }
  template <class D>
  void take(D& f, Arena& arena, const BackwardProblem<typename D::Scalar>& problem) const {
    const TableauSweep<D, Arena> sweep(f, arena, problem, tableau, Group{0, 1}, nullptr);
  }
  template <class D>
  NODESHAPE_INLINE void forward(D& f, Arena& arena, const ForwardProblem<typename D::Scalar>& problem,
                                int64_t sample) const {
    TableauSolve<D, Arena>(f, arena, problem, tableau, Group{sample, 1}).run();
  }
  template <class D>
  NODESHAPE_INLINE void backward(D& f, Arena& arena, const BackwardProblem<typename D::Scalar>& problem, int64_t sample,
                                 double* grad_t) const {
    TableauSweep<D, Arena>(f, arena, problem, tableau, Group{sample, 1}, grad_t).run();
  }
};

/// Weights laid out as `DeviceLayer` wants them.
template <class T>
__global__ void prepare_program(const __grid_constant__ ProgramWeights<T> weights) {
  for (int64_t l = 0; l < weights.layer_count; ++l) {
    const DeviceLayer<T>& layer = weights.layers[l];
    if (layer.kind == LayerKind::linear) {
      T* to = layer.fresh[0] != nullptr ? layer.fresh[0] : layer.fresh[1];
      if (to == nullptr) continue;
      const auto n = layer.linear;
      const T* from = weights.weights[layer.weight.number];
      const int rows = n.outputs_first ? n.out : n.in, columns = n.outputs_first ? n.in : n.out;
      each_of_grid(int64_t(rows) * columns, [=](int64_t i) { to[i] = from[i % rows * columns + i / rows]; });
    } else if (layer.kind == LayerKind::conv) {
      const T* from = weights.weights[layer.weight.number];
      for (int way = 0; way < 2; ++way) {
        T* to = layer.fresh[way];
        if (to == nullptr) continue;
        const Convolution& n = way == 0 ? layer.conv.forward : layer.conv.backward;
        const int width = n.padded_out, taps = n.taps(), in = n.in, out = n.out;
        each_of_grid(n.weights(), [=](int64_t at) {
          const int64_t o = at % width, tap = at / width % taps, i = at / width / taps % in, g = at / width / taps / in;
          const int64_t source =
              way == 0 ? ((g * out + o) * in + i) * taps + tap : ((g * in + i) * out + o) * taps + taps - 1 - tap;
          to[at] = o < out ? from[source] : T(0);
        });
      }
    }
  }
}

/// A program as the kernels read it. Host code.
template <class T>
class DeviceProgram {
 public:
  DeviceProgram(const ProgramModel& model, int64_t tapes, bool with_gradient, const Launch& on)
      : program_(model.program), with_gradient_(with_gradient), on_(on) {
    int64_t parameters = 0;
    for (int64_t k = 0; k < program_.weight_count; ++k) {
      gradients_.push_back(parameters);
      parameters += program_.weights[k].size;
    }
    small(parameters);
    for (int64_t l = 0; l < program_.layer_count; ++l) layers_.push_back(made(program_.layers[l]));
    for (DeviceLayer<T>& layer : layers_) lay_out(layer, model.weights);

    Upload upload;
    for (const DeviceLayer<T>& layer : layers_) upload.add_all(layer);
    for (int64_t k = 0; k < program_.weight_count; ++k) upload.add(model.weights[k]);
    const char* memory = static_cast<const char*>(upload.to_device(on));
    const Buffer& time = program_.buffers[1];
    weights_ = {program_.state(),
                parameters,
                tapes,
                small(with_gradient ? program_.kept : program_.brief),
                small(program_.cotangents),
                small(program_.scratch),
                2 * most_groups_,
                program_.layer_count,
                small(with_gradient ? time.kept : time.brief),
                small(time.cotangent),
                program_.uses_time,
                program_.zero_state,
                reinterpret_cast<const DeviceLayer<T>*>(memory),
                reinterpret_cast<const T* const*>(memory + layers_.size() * sizeof(DeviceLayer<T>))};
    launch_over(most_fresh_, prepare_program<T>, on, weights_);
  }

  const ProgramWeights<T>& weights() const { return weights_; }
  /// Elements that a team works on side by side: those of an average layer that multiplies, if there is any.
  int64_t work() const { return multiplying_ > 0 ? products_ / multiplying_ : most_elements_; }

 private:
  static int small(int64_t n) {
    if (n > std::numeric_limits<int>::max())
      throw std::runtime_error(
          "program: a sample is too large for a GPU, whose kernels count its elements in 32 bits: make it smaller");
    return int(n);
  }

  Spot spot(const Ref& ref) const {
    if (ref.is_weight()) {
      const int64_t k = ref.weight();
      return {Spot::weight, int(k), small(ref.offset), small(gradients_[k] + ref.offset), 0, 0};
    }
    const Buffer& buffer = program_.buffers[ref.buffer];
    const Spot::Base base = ref.buffer == 0 ? Spot::state : ref.buffer == program_.result ? Spot::result : Spot::tape;
    const bool placed = base == Spot::tape;
    const int64_t value = placed ? (with_gradient_ ? buffer.kept : buffer.brief) : 0;
    const int64_t cotangent = placed ? buffer.cotangent : 0;
    return {base, 0, small(value + ref.offset), small(cotangent + ref.offset), small(ref.offset), small(buffer.size)};
  }
  Spot spot_of_weight(int64_t k) const {
    if (k < 0) return {Spot::nothing, 0, 0, 0, 0, 0};
    return spot({-1 - k, 0});
  }

  /// A walk over dimensions of some sizes, by the elements that `by` tells apart.
  struct Dims {
    int64_t count;
    int64_t sizes[kMostDims], a[kMostDims], b[kMostDims], out[kMostDims];
  };
  static Walk walk(const Dims& dims, const int64_t* by) {
    Walk walk{1, 1, 0, 0, {}, {}, {}, {}};
    for (const bool tells : {true, false}) {
      for (int64_t d = 0; d < dims.count; ++d) {
        if (dims.sizes[d] == 1 || (by[d] != 0) != tells) continue;
        int& elements = tells ? walk.targets : walk.repeats;
        elements = small(elements * dims.sizes[d]);
        const int at = walk.dims++;
        walk.sizes[at] = small(dims.sizes[d]);
        walk.a[at] = small(dims.a[d]);
        walk.b[at] = small(dims.b[d]);
        walk.out[at] = small(dims.out[d]);
      }
      if (tells) walk.outer = walk.dims;
    }
    check_apart(dims, by);
    return walk;
  }

  /// Threads work on targets side by side, so no two of them may be the same element.
  static void check_apart(const Dims& dims, const int64_t* by) {
    std::vector<std::pair<int64_t, int64_t>> steps;  // stride, size
    for (int64_t d = 0; d < dims.count; ++d)
      if (dims.sizes[d] > 1 && by[d] != 0) steps.emplace_back(by[d], dims.sizes[d]);
    std::sort(steps.begin(), steps.end());
    int64_t reach = 0;
    for (const auto& [stride, size] : steps) {
      if (stride <= reach) throw std::runtime_error("program: a layer's strides overlap, which a GPU does not take");
      reach += stride * (size - 1);
    }
  }

  DeviceLayer<T> made(const Layer& from) {
    DeviceLayer<T> layer{};
    layer.kind = from.kind;
    layer.function = from.function;
    layer.live = from.live;
    layer.zero_a = from.zero_a;
    layer.add_a = from.add_a;
    layer.zero_b = from.zero_b;
    layer.add_b = from.add_b;
    const bool has_b = from.kind == LayerKind::binary || from.kind == LayerKind::matmul;
    layer.a = spot(from.a);
    layer.b = has_b ? spot(from.b) : spot_of_weight(-1);
    layer.out = spot(from.out);
    layer.scratch = from.scratch >= 0 ? spot({from.scratch, 0}) : spot_of_weight(-1);
    const bool weighs = from.kind == LayerKind::linear || from.kind == LayerKind::norm || from.kind == LayerKind::conv;
    layer.weight = spot_of_weight(weighs ? from.weight : -1);
    layer.bias = spot_of_weight(weighs ? from.bias : -1);
    std::copy_n(from.c, kLayerConstants, layer.c);
    constexpr int64_t kProductsPerThread = 16, kElementsPerThread = 4;
    switch (from.kind) {
      case LayerKind::linear: {
        const auto& n = from.linear;
        layer.linear = {small(n.positions), small(n.in), small(n.out), n.column == 1};
        take_products(n.positions * n.in * n.out / kProductsPerThread);
        break;
      }
      case LayerKind::unary:
        layer.count = small(from.unary.count);
        take_elements(from.unary.count / kElementsPerThread);
        break;
      case LayerKind::binary:
      case LayerKind::move: {
        const Strides& n = from.strides;
        Dims dims{n.dims, {}, {}, {}, {}};
        int64_t dense = 1;
        for (int64_t d = n.dims - 1; d >= 0; --d) {
          dims.sizes[d] = n.sizes[d];
          dims.a[d] = n.a[d];
          dims.b[d] = has_b ? n.b[d] : 0;
          dims.out[d] = has_b ? dense : n.b[d];
          dense *= n.sizes[d];
        }
        take_walks(layer, dims);
        // A copy goes to as many places as it has elements.
        if (from.kind == LayerKind::move && Move(from.function) == Move::copy && layer.strided.by_out.repeats > 1)
          throw std::runtime_error("program: a layer's strides overlap, which a GPU does not take");
        take_elements(dense / kElementsPerThread);
        break;
      }
      case LayerKind::matmul: {
        const auto& n = from.matmul;
        take_walks(layer, {4,
                           {n.batch, n.rows, n.columns, n.depth},
                           {n.a[0], n.a[1], 0, n.a[2]},
                           {n.b[0], 0, n.b[2], n.b[1]},
                           {n.rows * n.columns, n.columns, 1, 0}});
        take_products(n.batch * n.rows * n.columns * n.depth / kProductsPerThread);
        break;
      }
      case LayerKind::norm: {
        const auto& n = from.norm;
        layer.norm = {small(n.groups), small(n.size), small(n.inner), small(n.count)};
        small(n.groups * n.size + n.inner * n.count);
        most_groups_ = max(most_groups_, n.groups);
        take_elements(n.groups * n.size / kElementsPerThread);
        break;
      }
      case LayerKind::conv:
        take_convolution(layer, from);
    }
    return layer;
  }

  void take_walks(DeviceLayer<T>& layer, const Dims& dims) const {
    layer.strided = {walk(dims, dims.out), walk(dims, dims.a),
                     layer.b.base == Spot::nothing ? Walk{} : walk(dims, dims.b)};
  }

  void take_convolution(DeviceLayer<T>& layer, const Layer& from) {
    const auto& n = from.conv;
    const int64_t reach_y = n.dilation_height * (n.kernel_height - 1),
                  reach_x = n.dilation_width * (n.kernel_width - 1);
    const int64_t framed_y = n.height + 2 * n.pad_height, framed_x = n.width + 2 * n.pad_width;
    const auto convolution = [&](int64_t in, int64_t out, int64_t height, int64_t width, int64_t framed_height,
                                 int64_t framed_width) {
      in /= n.groups;
      out /= n.groups;
      small(n.groups * in * framed_height * framed_width + n.groups * out * height * width);
      return Convolution{small(n.groups),
                         small(in),
                         small(out),
                         small(out < 4 ? out : padded<T>(out)),
                         small(height),
                         small(width),
                         small(n.kernel_height),
                         small(n.kernel_width),
                         small(n.dilation_height),
                         small(n.dilation_width),
                         small(framed_height),
                         small(framed_width)};
    };
    auto& conv = layer.conv;
    conv.forward = convolution(n.in, n.out, framed_y - reach_y, framed_x - reach_x, framed_y, framed_x);
    conv.backward = convolution(n.out, n.in, n.height, n.width, n.height + reach_y, n.width + reach_x);
    conv.height = int(n.height);
    conv.width = int(n.width);
    conv.top = int(n.pad_height);
    conv.side = int(n.pad_width);
    conv.back_top = int(reach_y - n.pad_height);
    conv.back_side = int(reach_x - n.pad_width);
    for (const Convolution& c : {conv.forward, conv.backward})
      take_products(int64_t(c.groups) * ((c.out + 3) / 4) * ((c.pixels() + 3) / 4));
  }

  /// Room for the weights that prepare_program() lays out.
  void lay_out(DeviceLayer<T>& layer, const void* const* weights) {
    const auto fresh = [&](int64_t elements) {
      most_fresh_ = max(most_fresh_, elements);
      return on_.take<T>({elements});
    };
    if (layer.kind == LayerKind::linear) {
      const auto& n = layer.linear;
      const int way = n.outputs_first ? 0 : 1;  // that reads the weight across
      if (way == 0 || with_gradient_) layer.fresh[way] = fresh(int64_t(n.in) * n.out);
      const T* own = static_cast<const T*>(weights[layer.weight.number]);
      layer.forward = way == 0 ? layer.fresh[0] : own;
      layer.backward = way == 1 ? layer.fresh[1] : own;
    } else if (layer.kind == LayerKind::conv) {
      layer.forward = layer.fresh[0] = fresh(layer.conv.forward.weights());
      if (with_gradient_) layer.backward = layer.fresh[1] = fresh(layer.conv.backward.weights());
    }
  }

  void take_products(int64_t work) {
    products_ += work;
    ++multiplying_;
  }
  void take_elements(int64_t work) { most_elements_ = max(most_elements_, work); }

  const Program& program_;
  const bool with_gradient_;
  const Launch& on_;
  std::vector<int64_t> gradients_;  // where those of each weight begin
  std::vector<DeviceLayer<T>> layers_;
  int64_t most_groups_ = 0, most_fresh_ = 0;
  int64_t products_ = 0, multiplying_ = 0, most_elements_ = 0;
  ProgramWeights<T> weights_;
};

template <class T>
void forward_program(const ProgramModel& model, const ForwardProblem<T>& problem, const Launch& on) {
  const DeviceProgram<T> program(model, 1, false, on);
  if (problem.store > 0)
    solve(program.weights(), program.work(), ThetaSteps{}, problem, on);
  else
    solve(program.weights(), program.work(), TableauSteps{model.tableau}, problem, on);
}

template <class T>
void backward_program(const ProgramModel& model, const BackwardProblem<T>& problem, const std::vector<T*>& gradients,
                      const Launch& on) {
  const bool theta = problem.adjoint != Adjoint::discrete;
  const DeviceProgram<T> program(model, theta ? 1 : model.tableau.stages, true, on);
  const T* row = theta ? solve(program.weights(), program.work(), ThetaSteps{}, problem, on)
                       : solve(program.weights(), program.work(), TableauSteps{model.tableau}, problem, on);
  for (int64_t k = 0; k < model.program.weight_count; ++k) {
    const int64_t size = model.program.weights[k].size;
    if (size > 0) check(cudaMemcpyAsync(gradients[k], row, size * sizeof(T), cudaMemcpyDeviceToDevice, on.stream));
    row += size;
  }
}

template <>
void forward(const ProgramModel& model, ForwardProblem<float> problem, const Launch& on) {
  forward_program(model, problem, on);
}
template <>
void forward(const ProgramModel& model, ForwardProblem<double> problem, const Launch& on) {
  forward_program(model, problem, on);
}
template <>
void backward(const ProgramModel& model, BackwardProblem<float> problem, const std::vector<float*>& gradients,
              const Launch& on) {
  backward_program(model, problem, gradients, on);
}
template <>
void backward(const ProgramModel& model, BackwardProblem<double> problem, const std::vector<double*>& gradients,
              const Launch& on) {
  backward_program(model, problem, gradients, on);
}

}  // namespace nodeshape::cuda
