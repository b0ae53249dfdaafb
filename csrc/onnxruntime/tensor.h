// Tensors of onnxruntime as the checks of arguments see them: dense and on the CPU.
#pragma once

#include <utility>

#include "../sizes.h"

namespace nodeshape {

enum class ScalarType { Float, Double, Long, other };

/// It does not own its elements.
class Tensor {
 public:
  Tensor(Sizes sizes, ScalarType type, void* data) : sizes_(std::move(sizes)), type_(type), data_(data) {}

  const Sizes& sizes() const { return sizes_; }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t size(int64_t d) const { return sizes_[size_t(d)]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes_) count *= size;
    return count;
  }
  ScalarType scalar_type() const { return type_; }
  void* data_ptr() const { return data_; }
  bool is_cpu() const { return true; }
  int get_device_index() const { return 0; }
  bool is_contiguous() const { return true; }

 private:
  Sizes sizes_;
  ScalarType type_;
  void* data_;
};

inline const Tensor& dense(const Tensor& x) { return x; }

}  // namespace nodeshape
