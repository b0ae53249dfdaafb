// Sizes of tensors and buffers as products of arguments, none of which may overflow. Host code.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace nodeshape {

using Sizes = std::vector<int64_t>;

inline std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + "]";
}

/// The product of `sizes` and `unit`, none negative; false if it overflows.
inline bool multiply(const Sizes& sizes, int64_t unit, int64_t* product) {
  *product = unit;
  for (int64_t size : sizes)
    if (__builtin_mul_overflow(*product, size, product)) return false;
  return true;
}

/// Bytes of an array of `sizes` elements of `element` bytes.
inline int64_t checked_bytes(const std::string& name, const Sizes& sizes, int64_t element) {
  int64_t bytes;
  if (!multiply(sizes, element, &bytes))
    throw std::runtime_error(name + " of size " + text(sizes) + " would take more than 2^63 bytes; expected what fits" +
                             " into memory: take fewer samples, times or steps, or store fewer of the stages");
  return bytes;
}

}  // namespace nodeshape
