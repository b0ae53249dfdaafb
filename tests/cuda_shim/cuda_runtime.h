// CUDA as far as the solver uses it, on the CPU: compiled with this directory first among the include paths, a .cu file
// is plain C++ whose kernels run here.
//
// The threads of the blocks with the same blockIdx.x are fibres of one thread. They run one at a time, each from one
// barrier to the next, in an order drawn anew after every barrier: a barrier that is missing lets a fibre read what
// another has not written yet. Shared memory starts as NaN, and what a block did not ask for is poisoned for
// AddressSanitizer.
//
// NODESHAPE_ISA chooses what to play: "cuda", with numbers to change it, "cuda:threads=96,shared=4096,seed=7".
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __host__
#define __device__
#define __global__ __attribute__((noinline))
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMultiProcessorCount
};
enum { cudaLaunchAttributeCooperative };
enum { cudaMemcpyDeviceToDevice };
enum { cudaHostAllocMapped };

struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Of the fibre that runs; inside a kernel only.
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

void __syncthreads();
void __nanosleep(unsigned);
inline void __threadfence() {}
inline void __threadfence_system() {}

namespace cuda_shim {

/// What `launch` is asked for, the blocks with one blockIdx.x after those with another.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

/// A word from another lane of the warp.
uint64_t exchange(uint64_t word, int lane_mask);

int shared_limit();
int thread_limit();
constexpr unsigned kMultiprocessors = 10;  // each runs a block at a time

}  // namespace cuda_shim

template <class T>
T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  word = cuda_shim::exchange(word, lane_mask);
  std::memcpy(&x, &word, sizeof x);
  return x;
}

inline int atomicCAS(int* at, int expected, int desired) {
  const int found = *at;
  if (found == expected) *at = desired;
  return found;
}

inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long more) {
  const unsigned long long found = *at;
  *at += more;
  return found;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim;
  const bool together = config->numAttrs == 1 && config->attrs->id == cudaLaunchAttributeCooperative &&
                        config->attrs->val.cooperative == 1 && grid.x * grid.y <= cuda_shim::kMultiprocessors;
  if (grid.y > 1 && !together) return cudaErrorInvalidValue;  // blocks might wait for one that never runs
  if (int64_t(config->dynamicSmemBytes) > cuda_shim::shared_limit()) return cudaErrorInvalidValue;
  cuda_shim::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  return bytes <= cuda_shim::shared_limit() ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = cuda_shim::shared_limit();
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = cuda_shim::thread_limit();
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = int(cuda_shim::kMultiprocessors);
  }
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  *p = ::operator new(bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
