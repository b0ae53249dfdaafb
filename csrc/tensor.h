// The tensors that arguments come in: torch's, or onnxruntime's where its custom ops are compiled.
#pragma once

#include "sizes.h"

#ifdef NODESHAPE_ONNXRUNTIME
#include "onnxruntime/tensor.h"
#else
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

namespace nodeshape {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Sizes dense_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return strides;
}

template <class T>
int32_t dtype_of();
template <>
inline int32_t dtype_of<float>() {
  return aoti_torch_dtype_float32();
}
template <>
inline int32_t dtype_of<double>() {
  return aoti_torch_dtype_float64();
}

}  // namespace nodeshape
#endif

namespace nodeshape {

inline Sizes sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

}  // namespace nodeshape
