// The runs of elements that a layer's strides choose.
#pragma once

#include "simd.h"
#include "../program.h"

namespace nodeshape::NODESHAPE_TARGET {

/// Calls body(first, a, b, count, a stride, b stride) for each run along the last dimension: its rows from
/// `first` on in dense order, and where they begin in a and b.
template <class Body>
void each_run(const Strides& n, Body&& body) {
  const int64_t last = n.dims - 1, count = n.sizes[last];
  int64_t index[kMostDims] = {}, a = 0, b = 0, first = 0;
  while (true) {
    body(first, a, b, count, n.a[last], n.b[last]);
    first += count;
    int64_t d = last - 1;
    for (; d >= 0; --d) {
      a += n.a[d];
      b += n.b[d];
      if (++index[d] < n.sizes[d]) break;
      a -= n.sizes[d] * n.a[d];
      b -= n.sizes[d] * n.b[d];
      index[d] = 0;
    }
    if (d < 0) return;
  }
}

/// Calls body(from, to, channel) for the runs of rows [0, size) that share a scale; row r is element first + r.
template <class Body>
NODESHAPE_INLINE void each_channel(int64_t size, int64_t first, int64_t inner, int64_t count, Body&& body) {
  for (int64_t r = 0; r < size;) {
    const int64_t run = (first + r) / inner, rest = (run + 1) * inner - first;
    const int64_t end = rest < size ? rest : size;
    body(r, end, run % count);
    r = end;
  }
}

}  // namespace nodeshape::NODESHAPE_TARGET
