// What scheme.h, stage.h and the layers are written in, for a team of threads that carries one sample.
//
// Every thread of the team runs the same code with the same scalars; a vector is one number, and a loop over a
// sample's elements is shared out to the threads. Each such loop ends in a barrier, so whatever it wrote may be read by
// any thread in the next one.
//
// A team is one block, or for a sample too large for a block's shared memory several: those with the same blockIdx.x,
// counted by blockIdx.y. They wait for each other in global memory, so all must run at the same time (a cooperative
// launch). Blocks are whole warps.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../problem.h"

#define NODESHAPE_TARGET cuda
#ifdef __CUDACC__
#define NODESHAPE_INLINE __host__ __device__ __forceinline__
#else
#define NODESHAPE_INLINE inline __attribute__((always_inline))
#endif
#ifndef NODESHAPE_OUTLINE
#define NODESHAPE_OUTLINE  // a GPU's registers do not survive a call
#endif
/// For a function that is worth a call all the same.
#ifdef __CUDACC__
#define NODESHAPE_CALL __noinline__
#else
#define NODESHAPE_CALL __attribute__((noinline))
#endif

alignas(16) extern __shared__ double nodeshape_shared_memory[];

namespace nodeshape::cuda {

/// A team carries one sample: what it saves in fetched weights another one would cost in shared memory.
inline constexpr int kMaxGroup = 1;

template <class T>
using Vec = T;

/// Elements that are loaded and stored together; rows of channels are whole packs.
template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 4;
  T lanes[kCount];
};

template <class T>
NODESHAPE_INLINE constexpr int64_t padded(int64_t n) {
  return (n + Pack<T>::kCount - 1) / Pack<T>::kCount * Pack<T>::kCount;
}

template <class T>
NODESHAPE_INLINE T load(const T* p) {
  return *p;
}
template <class T>
NODESHAPE_INLINE void store(T* p, T x) {
  *p = x;
}
template <class T>
NODESHAPE_INLINE Pack<T> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
NODESHAPE_INLINE void store_pack(T* p, const Pack<T>& x) {
  *reinterpret_cast<Pack<T>*>(p) = x;
}
/// p, which the compiler may take to point to global memory; an Arena's pieces are where it finds room.
template <class T>
NODESHAPE_INLINE T* in_global(T* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}
template <class T>
NODESHAPE_INLINE T splat(T x) {
  return x;
}
NODESHAPE_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
NODESHAPE_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
template <class T>
NODESHAPE_INLINE T max(T a, T b) {
  return a > b ? a : b;
}
template <class T>
NODESHAPE_INLINE T min(T a, T b) {
  return a < b ? a : b;
}

// Scalars are computed by every thread alike, and in double they would take a GPU without double units longer than the
// sample's own arithmetic.
template <class T>
NODESHAPE_INLINE double square_root(double x) {
  return double(std::sqrt(T(x)));
}
template <class T>
NODESHAPE_INLINE T reciprocal(double x) {
  return T(1) / T(x);
}

NODESHAPE_INLINE float quotient(float a, float b) { return a / b; }

/// 2^n for whole n from -126 to 127.
NODESHAPE_INLINE float power_of_two(float n) {
  const int32_t bits = (int32_t(n) + 127) * (1 << 23);
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}

template <class Function>
NODESHAPE_INLINE double lane_by_lane(double x, Function&& function) {
  return function(x);
}

// ---- the team ----------------------------------------------------------------------------------------------------

inline constexpr int kWarp = 32;
inline constexpr int kMostThreads = 256;  // of a block
inline constexpr int kMostBlocks = 8;     // of a team

/// What the blocks of a team wait at, and where they reduce, in global memory; zero before the kernel.
struct GridBarrier {
  unsigned long long arrived;  // blocks at barriers so far
  alignas(128) double scratch[kMostBlocks * kMostThreads];
};

/// What begins a block's shared memory; then comes room for a reduction, unless that is in the GridBarrier, then the
/// Arena's.
struct alignas(16) Header {
  GridBarrier* grid_barrier;  // null for a block alone
  int reduction_width;
};

NODESHAPE_INLINE int64_t scratch_bytes(int64_t width) { return width * int64_t(sizeof(double)); }

// Functions that scheme.h calls on the device exist on the host too, where they are compiled and never run.
#if defined(__CUDA_ARCH__) || !defined(__CUDACC__)
NODESHAPE_INLINE bool alone() { return gridDim.y == 1; }
/// Of the team, as is the number of them.
NODESHAPE_INLINE int thread() { return int(blockIdx.y * blockDim.x + threadIdx.x); }
NODESHAPE_INLINE int threads() { return int(gridDim.y * blockDim.x); }
NODESHAPE_INLINE Header& header() { return *reinterpret_cast<Header*>(nodeshape_shared_memory); }
NODESHAPE_INLINE char* shared_memory() { return reinterpret_cast<char*>(&header() + 1); }
/// Threads that sums are formed as if by: as many as a sample's size alone decides. A thread of a small team plays
/// several of them, so that not a bit depends on how many blocks the GPU had to spare.
NODESHAPE_INLINE int reduction_width() {
#ifdef __CUDA_ARCH__
  if (alone() && blockDim.x == kWarp) return kWarp;  // a small sample; only the tests give a large one such blocks
#endif
  return header().reduction_width;
}
/// Room for a number of each thread of a reduction.
NODESHAPE_INLINE char* scratch() {
  return alone() ? shared_memory() : reinterpret_cast<char*>(header().grid_barrier->scratch);
}

/// What every kernel written in the loops below begins with.
NODESHAPE_INLINE void join(const Header& team) {
  if (threadIdx.x == 0) header() = team;
  __syncthreads();
}

/// Between the blocks of a team.
inline NODESHAPE_FUNCTION NODESHAPE_OUTLINE void meet() {
  if (threadIdx.x == 0) {
    __threadfence();  // what this block has written, before its arrival
    unsigned long long& arrived = header().grid_barrier->arrived;
    const unsigned long long before = atomicAdd(&arrived, 1ull), all = (before / gridDim.y + 1) * gridDim.y;
    while (*const_cast<volatile unsigned long long*>(&arrived) < all) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}
NODESHAPE_INLINE void barrier() {
  __syncthreads();
  if (!alone()) meet();
}

template <class T>
NODESHAPE_INLINE T from_lane_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
#else
inline int thread() { return 0; }
inline int threads() { return 1; }
inline int reduction_width() { return 1; }
inline char* shared_memory() { return nullptr; }
inline char* scratch() { return nullptr; }
inline void join(const Header&) {}
inline void barrier() {}
template <class T>
T from_lane_xor(T x, int) {
  return x;
}
#endif

/// Whether this thread keeps the records of the sample its team carries.
NODESHAPE_INLINE bool leads() { return thread() == 0; }
/// A kernel that runs is not interrupted.
NODESHAPE_INLINE constexpr bool interrupted() { return false; }

/// Calls body(i) for every i below `size`.
template <class T, class Body>
NODESHAPE_INLINE void each(int64_t size, Body&& body) {
  for (int64_t i = thread(); i < size; i += threads()) body(i);
  barrier();
}

template <class Body>
NODESHAPE_INLINE void spread(int64_t count, Body&& body) {
  for (int64_t i = thread(); i < count; i += threads()) body(i);
  barrier();
}

/// body(i) for every i, combined in a fixed order: the same bits in every thread.
template <class T, class Body, class Combine>
NODESHAPE_INLINE T reduce(int64_t size, Body&& body, Combine&& combine) {
  const int all = int(min(int64_t(reduction_width()), (max(size, int64_t(1)) + kWarp - 1) / kWarp * kWarp));
  T* warps = reinterpret_cast<T*>(scratch());
  T result = 0;
  for (int member = thread(); member < all; member += threads()) {
    result = 0;
    for (int64_t i = member; i < size; i += all) result = combine(result, body(i));
    for (int mask = kWarp / 2; mask > 0; mask /= 2) result = combine(result, from_lane_xor(result, mask));
    if (member % kWarp == 0) warps[member / kWarp] = result;
  }
  if (all > kWarp || threads() > kWarp) {
    barrier();
    result = warps[0];
    for (int w = 1; w < all / kWarp; ++w) result = combine(result, warps[w]);
  }
  barrier();
  return result;
}

template <class T, class Body>
NODESHAPE_INLINE T total(int64_t size, Body&& body) {
  return reduce<T>(size, body, [](T a, T b) { return a + b; });
}

/// The largest magnitude of body(i); NaN is none.
template <class T, class Body>
NODESHAPE_INLINE T largest(int64_t size, Body&& body) {
  const auto magnitude = [&](int64_t i) {
    const T x = body(i);
    return x < 0 ? -x : x;
  };
  return reduce<T>(size, magnitude, [](T a, T b) { return b > a ? b : a; });
}

/// sink(c, the sum over rows of column(c)(row)) for every column c: threads side by side take columns side by side, and
/// where columns are fewer than the reduction is wide, a share of the rows each; as many shares as rows in a share are
/// enough.
template <class T, class Column, class Sink>
NODESHAPE_INLINE void add_up(int64_t rows, int64_t columns, Column&& column, Sink&& sink) {
  const int all = reduction_width(), enough = int(std::sqrt(float(rows)));
  const int shares = columns > 0 && columns < all ? int(max(min(all / int(columns), enough), 1)) : 1;
  const auto sum_of = [&](int64_t c, int share) {
    const auto body = column(c);
    T s0 = 0, s1 = 0;
    int64_t r = share;
    for (; r + shares < rows; r += 2 * shares) {
      s0 += body(r);
      s1 += body(r + shares);
    }
    if (r < rows) s0 += body(r);
    return s0 + s1;
  };
  if (shares == 1) {
    for (int64_t c = thread(); c < columns; c += threads()) sink(c, sum_of(c, 0));
    barrier();
    return;
  }
  T* sums = reinterpret_cast<T*>(scratch());
  for (int member = thread(); member < shares * int(columns); member += threads()) {
    const int share = member / int(columns);
    sums[member] = sum_of(member - share * columns, share);
  }
  barrier();
  for (int c = thread(); c < int(columns); c += threads()) {
    T sum = sums[c];
    for (int s = 1; s < shares; ++s) sum += sums[s * columns + c];
    sink(c, sum);
  }
  barrier();
}

/// sums[c] = the sum over rows of body(row, c).
template <class T, class Body>
NODESHAPE_INLINE void sum_rows(int64_t rows, int64_t columns, T* sums, Body&& body) {
  add_up<T>(
      rows, columns, [&](int64_t c) { return [&body, c](int64_t r) { return body(r, c); }; },
      [=](int64_t c, T sum) { sums[c] = sum; });
}

}  // namespace nodeshape::cuda
