// Pixels of a feature map by the borders they touch, which is all that a constant input channel's convolution sees.
#pragma once

#include "problem.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Border classes of pixels: bit 0 touches the top, bit 1 the bottom, bit 2 the left, bit 3 the right border.
inline constexpr int kBorderClasses = 16;

NODESHAPE_FUNCTION inline int border_class(int64_t y, int64_t x, int64_t height, int64_t width) {
  return int(y == 0) | int(y == height - 1) << 1 | int(x == 0) << 2 | int(x == width - 1) << 3;
}

/// Whether the filter's tap reads inside the map at such a pixel.
NODESHAPE_FUNCTION inline bool inside(int tap, int border) {
  const int down = tap / 3, across = tap % 3;
  return !(down == 0 && border & 1) && !(down == 2 && border & 2) && !(across == 0 && border & 4) &&
         !(across == 2 && border & 8);
}

}  // namespace nodeshape::NODESHAPE_TARGET
