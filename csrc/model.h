// The dynamics that has a kernel of its own, as its parameters.
#pragma once

#include "problem.h"

namespace nodeshape {

/// GroupNorm-ReLU-Conv-GroupNorm-ReLU-Conv-GroupNorm, time the first channel of each convolution; parameters in the
/// order of ConvDynamics.state_dict().
struct ConvModel {
  int64_t channels, height, width, groups;
  const void* parameters[10];  // float or double
};

}  // namespace nodeshape
