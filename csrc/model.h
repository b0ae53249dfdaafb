// The dynamics that have a fused solver, as their parameters.
#pragma once

#include "problem.h"

namespace nodeshape {

/// GroupNorm-ReLU-Conv-GroupNorm-ReLU-Conv-GroupNorm; parameters in the order of ConvDynamics.state_dict().
struct ConvModel {
  int64_t channels, height, width, groups;
  const void* parameters[10];  // float or double
};

/// In the order of nodeshape/_models/dynamics.py's ACTIVATIONS.
enum class Activation : int { tanh, relu, softplus, silu };
inline constexpr int64_t kActivations = 4;

/// A chain of Linear layers; parameters in the order of MLPDynamics.state_dict().
struct MlpModel {
  int64_t dim;
  int64_t layers;
  const int64_t* widths;          // [layers], outputs of each layer; the last is dim
  const void* const* parameters;  // [2 * layers]: weight [out, in], bias [out]
  Activation activation;

  NODESHAPE_SMALL int64_t in(int64_t layer) const { return layer == 0 ? dim : widths[layer - 1]; }  // without time
  NODESHAPE_SMALL int64_t columns(int64_t layer) const { return in(layer) + (layer == 0); }         // of its weight
  /// Elements of all parameters together.
  NODESHAPE_SMALL int64_t parameter_count() const {
    int64_t total = 0;
    for (int64_t l = 0; l < layers; ++l) total += widths[l] * (columns(l) + 1);
    return total;
  }
};

}  // namespace nodeshape
