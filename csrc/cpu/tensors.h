// Tensors that the ops make, and torch's threads.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <sstream>
#include <string>

#include "../solve_ops.h"
#include "company.h"
#include "interruption.h"
#include "pages.h"

namespace nodeshape {

inline int64_t element_size(int32_t dtype) { return dtype == aoti_torch_dtype_float32() ? 4 : 8; }

/// Elements of states that a solve goes through.
inline double work_of(const Tensor& y0, const Grid& grid) { return double(y0.numel()) * double(grid.total_steps()); }

inline std::atomic<int64_t> most_threads = 1;  // that shared a solve's work since tests last asked

/// Bytes that this process may still take, of the machine and of its container; infinite where nobody says.
inline double free_memory() {
  const auto number = [](const char* path, const std::string& behind) {
    std::ifstream file(path);
    for (std::string word; file >> word;) {
      if (behind.empty()) return word == "max" ? HUGE_VAL : std::strtod(word.c_str(), nullptr);
      double value;
      if (word == behind && file >> value) return value;
    }
    return HUGE_VAL;
  };
  const double machine = 1024 * number("/proc/meminfo", "MemAvailable:");
  const double limit = number("/sys/fs/cgroup/memory.max", "");
  const double container = std::isfinite(limit) ? limit - number("/sys/fs/cgroup/memory.current", "") : HUGE_VAL;
  return std::min(machine, container);
}

/// Throws if a solve that stores so much cannot succeed, before it begins.
inline void check_memory(double bytes) {
  constexpr double kLittle = 1 << 28, kGigabyte = 1e9;
  if (bytes < kLittle) return;
  const double there = free_memory();
  if (bytes <= there) return;
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << "MemoryError: the solve would keep " << bytes / kGigabyte
       << " GB for the backward pass and " << there / kGigabyte
       << " GB are free: use adjoint='reversible', fewer steps or a smaller batch";
  throw std::runtime_error(text.str());
}

inline Tensor empty(const Sizes& sizes, int32_t dtype) {
  checked_bytes("a tensor", sizes, element_size(dtype));
  const Sizes strides = dense_strides(sizes);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

/// As empty(), for what the backward pass needs and nobody else sees; a large one has the memory of the one before it.
inline Tensor empty_stored(const Sizes& sizes, int32_t dtype) {
  const size_t bytes = size_t(checked_bytes("stages", sizes, element_size(dtype)));
  check_memory(double(bytes));
  size_t block = 0;
  void* data = torch_from_blob != nullptr && Pages::suit(bytes) ? Pages::take(bytes, &block) : nullptr;
  if (data == nullptr) return empty(sizes, dtype);
  const Sizes strides = dense_strides(sizes);
  AtenTensorHandle handle;
  const AOTITorchError error = torch_from_blob(
      data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0,
      [](void* p, void* context) { Pages::give(p, reinterpret_cast<size_t>(context)); },
      reinterpret_cast<void*>(block));
  if (error != AOTI_TORCH_SUCCESS) Pages::give(data, block);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

/// Gradients of the parameters, as a kernel leaves them in one row, as tensors like the parameters.
template <class T>
std::vector<Tensor> parted(const T* row, const std::vector<Tensor>& parameters) {
  std::vector<Tensor> parts;
  parts.reserve(parameters.size());
  for (const Tensor& x : parameters) {
    const int64_t count = x.numel();
    parts.push_back(empty(sizes_of(x), dtype_of<T>()));
    std::copy(row, row + count, data<T>(parts.back()));
    row += count;
  }
  return parts;
}

/// Torch's intra-op threads.
inline Executor executor() {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  return {threads > 1 && Company::is_bad() ? 1 : threads,
          [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
            std::atomic<int64_t> threads = 0;
            torch::stable::parallel_for(0, tasks, 1, [&threads, task, context](int64_t begin, int64_t end) {
              ++threads;  // each gets one piece of the range
              for (int64_t i = begin; i < end; ++i) task(i, context);
            });
            int64_t most = most_threads;
            while (most < threads && !most_threads.compare_exchange_weak(most, threads)) {
            }
          },
          Company::judge};
}

}  // namespace nodeshape
