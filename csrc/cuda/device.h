// How an op runs on a CUDA device: its tensors, its scratch memory, what its kernels report.
#pragma once

#ifndef NODESHAPE_CUDA_ON_HOST
#define NODESHAPE_DISPATCH_KEY CUDA
#define USE_CUDA  // torch's header declares aoti_torch_get_current_cuda_stream() with it
#else             // the tests' build, whose device is the CPU
#define NODESHAPE_DISPATCH_KEY CPU
#endif

#include "../solve_ops.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <map>
#include <mutex>

#include "kernels.h"

namespace nodeshape {

/// The device the state is on, made current while this lives.
class Device {
 public:
#ifndef NODESHAPE_CUDA_ON_HOST
  static bool has(const Tensor& x) { return x.is_cuda(); }

  explicit Device(const Tensor& x)
      : index_(x.get_device_index()), type_(aoti_torch_device_type_cuda()), guard_(index_) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
#else
  static bool has(const Tensor& x) { return x.is_cpu(); }

  explicit Device(const Tensor&) : index_(0), type_(aoti_torch_device_type_cpu()) {}

  cudaStream_t stream() const { return nullptr; }
#endif

  int32_t index() const { return index_; }

  Tensor empty(const Sizes& sizes, int32_t dtype) const {
    checked_bytes("a tensor", sizes, dtype == aoti_torch_dtype_float32() ? 4 : 8);
    const Sizes strides = dense_strides(sizes);
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, type_, index_, &handle));
    return Tensor(handle);
  }

 private:
  int32_t index_, type_;
#ifndef NODESHAPE_CUDA_ON_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

/// What the kernels of each device that has run an op report.
class Reports {
 public:
  cuda::Report* of(const Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = reports_.find(device.index());
    if (found != reports_.end()) return found->second;
    void* memory = nullptr;
    const cudaError_t error = cudaHostAlloc(&memory, sizeof(cuda::Report), cudaHostAllocMapped);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    return reports_[device.index()] = new (memory) cuda::Report;
  }

  /// Raise what an earlier solve reported, if it has come so far.
  void raise() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [device, report] : reports_) {
      const int written = __atomic_load_n(&report->written, __ATOMIC_ACQUIRE);
      if (report->raised == written) continue;
      const FirstFailures failed = report->failed;
      const int64_t samples = report->samples;
      const double tolerance = report->tolerance, drift_tolerance = report->drift_tolerance;
      __atomic_store_n(&report->raised, written, __ATOMIC_RELEASE);
      check_failures(failed, samples, tolerance, drift_tolerance);
    }
  }

 private:
  std::mutex mutex_;
  std::map<int32_t, cuda::Report*> reports_;  // kept to the end of the process: kernels may still write
};
inline Reports reports;

/// Scratch memory of one op, from torch's allocator: what is freed is used again only after what the stream has to do.
class Scratch {
 public:
  explicit Scratch(const Device& device) : device_(device) {}

  cuda::Launch launch() {
    return {device_.stream(),
            [this](int64_t bytes) {
              tensors_.push_back(device_.empty({(bytes + 7) / 8}, aoti_torch_dtype_int64()));
              return tensors_.back().data_ptr();
            },
            reports.of(device_)};
  }

 private:
  const Device& device_;
  std::vector<Tensor> tensors_;
};

/// `stored_as` are the sizes of what the forward solve keeps for the backward pass.
template <class T, class Model>
SolveResult run(const Common& common, const Model& model, const Sizes& stored_as, const Tensor& y0) {
  const Device device(y0);
  const Grid grid = common.grid();
  const int64_t samples = y0.size(0);
  Sizes sizes = sizes_of(y0);
  sizes.insert(sizes.begin(), grid.count);
  const Tensor ys = device.empty(sizes, dtype_of<T>());
  const Tensor stored = device.empty(stored_as, dtype_of<T>());
  const Tensor evaluations = device.empty({samples}, aoti_torch_dtype_int64());
  const Tensor residual = device.empty({samples}, aoti_torch_dtype_float64());
  const Tensor start = dense(y0);
  Scratch scratch(device);
  cuda::forward<Model, T>(model,
                          {grid, common.stage(), samples, common.store(), data<T>(start), data<T>(ys), data<T>(stored),
                           data<int64_t>(evaluations), data<double>(residual), nullptr},
                          scratch.launch());
  return {ys, stored, evaluations, residual};
}

template <class T, class Model>
GradientResult run_backward(const Common& common, const Model& model, const std::vector<Tensor>& tensors,
                            const Tensor& y0, const BackwardArguments& arguments) {
  const Device device(y0);
  const Grid grid = common.grid();
  const int64_t samples = y0.size(0);
  const Tensor grad_ys = dense(arguments.grad_ys), ys = dense(arguments.ys), stored = dense(arguments.stored);
  const Tensor grad_y0 = device.empty(sizes_of(y0), dtype_of<T>());
  const Tensor grad_t = device.empty({grid.count}, aoti_torch_dtype_float64());
  const Tensor evaluations = device.empty({samples}, aoti_torch_dtype_int64());
  std::vector<Tensor> grads;
  std::vector<T*> gradients;
  for (const Tensor& x : tensors) {
    grads.push_back(device.empty(sizes_of(x), dtype_of<T>()));
    gradients.push_back(data<T>(grads.back()));
  }
  Scratch scratch(device);
  cuda::backward<Model, T>(model,
                           {grid, common.stage(), samples, adjoint_of(common), common.store(), common.drift_tolerance,
                            data<T>(grad_ys), data<T>(ys), data<T>(stored), data<T>(grad_y0), data<double>(grad_t),
                            nullptr, data<int64_t>(evaluations), nullptr},
                           gradients, scratch.launch());
  return {grad_y0, grad_t, grads, evaluations};
}

}  // namespace nodeshape
