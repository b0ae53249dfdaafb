// Launching kernels, and small arguments on their way to the device.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.cuh"
#include "kernels.h"

namespace nodeshape::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

/// Of the current device.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

/// Shared memory that a block may have on the current device.
inline int64_t most_shared_bytes() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

/// Let a kernel be launched with all of it. Not with what one launch needs: threads that launch the same kernel would
/// undo each other's.
inline void allow_shared_memory(const void* kernel) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most_shared_bytes())));
}

/// Blocks of a kernel that the current device runs at a time.
inline int64_t resident_blocks(const void* kernel, int threads, int64_t shared_bytes) {
  allow_shared_memory(kernel);
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, size_t(shared_bytes)));
  return int64_t(resident) * attribute(cudaDevAttrMultiProcessorCount);
}

/// Blocks of a launch: `teams` of `blocks`, which run at the same time if they are more than one, of `threads`.
struct Teams {
  int64_t teams;
  int blocks, threads;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Teams teams, int64_t shared_bytes, const Launch& on,
            Arguments&&... arguments) {
  if (shared_bytes > 0) allow_shared_memory(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(teams.teams), unsigned(teams.blocks));
  config.blockDim = dim3(unsigned(teams.threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = on.stream;
  config.attrs = &together;
  config.numAttrs = teams.blocks > 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

/// In a kernel launched by launch_over(): body(i) for every i below `count`.
template <class Body>
NODESHAPE_INLINE void each_of_grid(int64_t count, Body&& body) {
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    body(i);
#endif
}

template <class... Parameters, class... Arguments>
void launch_over(int64_t count, void (*kernel)(Parameters...), const Launch& on, Arguments&&... arguments) {
  constexpr int64_t kLargestGrid = 1024;
  const int64_t blocks = min((count + kMostThreads - 1) / kMostThreads, kLargestGrid);
  if (blocks > 0) launch(kernel, Teams{blocks, 1, kMostThreads}, 0, on, std::forward<Arguments>(arguments)...);
}

struct Words {
  static constexpr int kCount = 256;
  int64_t words[kCount];
};

static __global__ void write_words(int64_t count, const __grid_constant__ Words from, int64_t* to) {
  each_of_grid(count, [&](int64_t i) { to[i] = from.words[i]; });
}

/// A few 64-bit words that travel to the device as kernel arguments: no host memory has to outlive the call, and a CUDA
/// graph keeps them.
class Upload {
 public:
  template <class Word>
  void add(Word word) {
    static_assert(sizeof(Word) == sizeof(int64_t));
    int64_t bits;
    std::memcpy(&bits, &word, sizeof bits);
    words_.push_back(bits);
  }

  /// All words of a structure.
  template <class Structure>
  void add_all(const Structure& structure) {
    static_assert(sizeof(Structure) % sizeof(int64_t) == 0);
    int64_t words[sizeof(Structure) / sizeof(int64_t)];
    std::memcpy(words, &structure, sizeof words);
    words_.insert(words_.end(), words, words + sizeof(Structure) / sizeof(int64_t));
  }

  void* to_device(const Launch& on) const {
    const int64_t count = int64_t(words_.size());
    int64_t* to = on.take<int64_t>({count});
    for (int64_t from = 0; from < count; from += Words::kCount) {
      Words piece;
      const int64_t size = count - from < Words::kCount ? count - from : Words::kCount;
      std::memcpy(piece.words, words_.data() + from, size * sizeof(int64_t));
      launch_over(size, write_words, on, size, piece, to + from);
    }
    return to;
  }

 private:
  std::vector<int64_t> words_;
};

}  // namespace nodeshape::cuda
