// The only file that knows an instruction set: vectors of T, and the few loops everything else is written in.
//
// Included once per instruction set, each time in its own namespace (NODESHAPE_TARGET), so that no function compiled
// for one is ever linked into another. For the same reason nothing here instantiates a template of the standard
// library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace nodeshape {
extern int interruption;
}

namespace nodeshape::NODESHAPE_TARGET {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#elif defined(__ARM_NEON)
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

#define NODESHAPE_INLINE inline __attribute__((always_inline))
/// For what works long enough that a call costs nothing: one copy, however many call it, halves the time to compile.
#define NODESHAPE_OUTLINE __attribute__((noinline))

/// Samples that are evaluated together, so that weights are fetched once for all of them.
inline constexpr int kMaxGroup = 16;

/// Whether this thread keeps the records of the samples it carries; here a sample has one thread.
NODESHAPE_INLINE constexpr bool leads() { return true; }
/// Whether the time loops are to end early; see interruption.h.
NODESHAPE_INLINE bool interrupted() { return __atomic_load_n(&nodeshape::interruption, __ATOMIC_RELAXED) != 0; }

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

/// Elements of a vector of T.
template <class T>
inline constexpr int64_t kLanes = kVectorBytes / sizeof(T);

/// n rounded up to whole vectors.
template <class T>
NODESHAPE_INLINE constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
NODESHAPE_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
NODESHAPE_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

/// A whole vector, or only its first elements.
struct Whole {};
struct Part {
  int64_t count;  // from 1 to less than the lanes
};

template <class T>
NODESHAPE_INLINE constexpr int64_t lanes_of(Whole) {
  return kLanes<T>;
}
template <class T>
NODESHAPE_INLINE int64_t lanes_of(Part n) {
  return n.count;
}

template <class T>
NODESHAPE_INLINE Vec<T> load(const T* p, Whole) {
  return load(p);
}
template <class T>
NODESHAPE_INLINE void store(T* p, Vec<T> v, Whole) {
  store(p, v);
}
#if defined(__AVX512F__)
NODESHAPE_INLINE Vec<float> load(const float* p, Part n) { return _mm512_maskz_loadu_ps((1u << n.count) - 1, p); }
NODESHAPE_INLINE Vec<double> load(const double* p, Part n) { return _mm512_maskz_loadu_pd((1u << n.count) - 1, p); }
NODESHAPE_INLINE void store(float* p, Vec<float> v, Part n) { _mm512_mask_storeu_ps(p, (1u << n.count) - 1, v); }
NODESHAPE_INLINE void store(double* p, Vec<double> v, Part n) { _mm512_mask_storeu_pd(p, (1u << n.count) - 1, v); }
#else
/// Zero beyond the part.
template <class T>
NODESHAPE_INLINE Vec<T> load(const T* p, Part n) {
  Vec<T> v{};
  for (int64_t i = 0; i < kLanes<T> - 1; ++i)
    if (i < n.count) v[i] = p[i];
  return v;
}
template <class T>
NODESHAPE_INLINE void store(T* p, Vec<T> v, Part n) {
  for (int64_t i = 0; i < kLanes<T> - 1; ++i)
    if (i < n.count) p[i] = v[i];
}
#endif

template <class T>
NODESHAPE_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

/// a b + c, rounded once where the instruction set can.
NODESHAPE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

NODESHAPE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

/// a > b ? a : b, so that a NaN in b is kept.
template <class V>
NODESHAPE_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

/// a < b ? a : b, so that a NaN in b is kept.
template <class V>
NODESHAPE_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// GCC 12 takes the general form for a comparison where an argument is a constant.
#if defined(__AVX512F__)
// The mask spares it a false warning.
NODESHAPE_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
NODESHAPE_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#elif defined(__AVX2__)
NODESHAPE_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
NODESHAPE_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
#endif

/// a / b to two units in the last place, for b whose reciprocal is neither denormal nor infinite.
NODESHAPE_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  const Vec<float> r = _mm512_maskz_rcp14_ps(0xffff, b), y = a * r;
  return fma(fma(-b, y, a), r, y);  // a step of Newton's method, four times as fast as dividing
#else
  return a / b;
#endif
}

/// 2^n for whole n from -126 to 127.
NODESHAPE_INLINE Vec<float> power_of_two(Vec<float> n) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  return (Vec<float>)bits;
}

template <class Function>
NODESHAPE_INLINE Vec<double> lane_by_lane(Vec<double> x, Function&& function) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = function(x[i]);
  return x;
}

// Scalars of a solve of T; a GPU computes them in T.
template <class T>
NODESHAPE_INLINE double square_root(double x) {
  return std::sqrt(x);
}
template <class T>
NODESHAPE_INLINE T reciprocal(double x) {
  return T(1.0 / x);
}

/// The sum of a vector's lanes, in a fixed order.
template <class T>
NODESHAPE_INLINE T sum(Vec<T> v) {
  T lanes[kLanes<T>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class T>
NODESHAPE_INLINE T sum(Vec<T> v, Whole) {
  return sum<T>(v);
}
template <class T>
NODESHAPE_INLINE T sum(Vec<T> v, Part n) {
  T total = 0;
  for (int64_t i = 0; i < n.count; ++i) total += v[i];
  return total;
}

/// Calls body(i) for i = 0, lanes, 2 lanes, ... below `size`, a multiple of lanes.
template <class T, class Body>
NODESHAPE_INLINE void each(int64_t size, Body&& body) {
  for (int64_t i = 0; i < size; i += kLanes<T>) body(i);
}

/// Calls body(i, Whole or Part) for i = 0, lanes, 2 lanes, ... below `count`.
template <class T, class Body>
NODESHAPE_INLINE void each_part(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

/// A range of channels, from a multiple of the lanes to another.
struct Span {
  int64_t begin, end;
};

/// Calls body(i) for each vector of a range.
template <class T, class Body>
NODESHAPE_INLINE void each(Span range, Body&& body) {
  for (int64_t i = range.begin; i < range.end; i += kLanes<T>) body(i);
}

/// Calls body(i) for i = 0, 1, ... below `count`.
template <class Body>
NODESHAPE_INLINE void spread(int64_t count, Body&& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

/// The sum over i of the vectors body(i), as one number; four running sums hide the latency of addition.
template <class T, class Body>
NODESHAPE_INLINE T total(int64_t size, Body&& body) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * lanes <= size; i += 4 * lanes) {
    s0 += body(i);
    s1 += body(i + lanes);
    s2 += body(i + 2 * lanes);
    s3 += body(i + 3 * lanes);
  }
  for (; i < size; i += lanes) s0 += body(i);
  return sum<T>((s0 + s1) + (s2 + s3));
}

/// The largest magnitude of the elements of the vectors body(i); NaN is none.
template <class T, class Body>
NODESHAPE_INLINE T largest(int64_t size, Body&& body) {
  Vec<T> most{};
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const Vec<T> x = body(i);
    most = max(max(x, -x), most);
  }
  T peak = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) peak = most[lane] > peak ? most[lane] : peak;
  return peak;
}

/// sums[c] = the sum over rows of body(row, c), for each vector of columns c.
template <class T, class Body>
NODESHAPE_INLINE void sum_rows(int64_t rows, int64_t columns, T* sums, Body&& body) {
  each<T>(columns, [&](int64_t c) {
    Vec<T> s0{}, s1{}, s2{}, s3{};
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      s0 += body(r, c);
      s1 += body(r + 1, c);
      s2 += body(r + 2, c);
      s3 += body(r + 3, c);
    }
    for (; r < rows; ++r) s0 += body(r, c);
    store(sums + c, (s0 + s1) + (s2 + s3));
  });
}

}  // namespace nodeshape::NODESHAPE_TARGET
