// A dynamics as data: layers that write buffers, in the order in which they run. What every device reads.
//
// Buffer 0 is the state, buffer 1 the time, one element; a layer reads and writes contiguous buffers, each of so many
// elements per sample. In memory a tile of samples lies side by side: element e of all of them is row e.
#pragma once

#include "model.h"

namespace nodeshape {

enum class LayerKind : int64_t { linear, unary, binary, move, norm, conv, matmul };
inline constexpr int64_t kLayerKinds = 7;

/// Functions of one element; c are the layer's constants.
enum class Unary : int64_t {
  affine,  // c0 x + c1
  tanh,
  sigmoid,
  relu,
  leaky_relu,  // slope c0
  elu,         // c1 x, or c0 (e^(c2 x) - 1) below zero
  gelu,
  gelu_tanh,
  silu,
  softplus,  // log(1 + e^(c0 x)) / c0, or x where c0 x > c1
  mish,
  sin,
  cos,
  exp,
  log,
  sqrt,
  abs,
  power,  // x^c0
  reciprocal,
  clamp,  // to [c0, c1]
  erf,
  square,
  cube,
  atan,
  asinh,
  log1p,
  expm1,
};
inline constexpr int64_t kUnaries = 27;

/// Whether f'(x) is computed from x.
NODESHAPE_SMALL constexpr bool slope_reads_argument(Unary f) {
  switch (f) {
    case Unary::affine:
    case Unary::tanh:
    case Unary::sigmoid:
    case Unary::exp:
    case Unary::sqrt:
    case Unary::reciprocal:
    case Unary::expm1:
      return false;
    default:
      return true;
  }
}
/// Whether f'(x) is computed from f(x).
NODESHAPE_SMALL constexpr bool slope_reads_value(Unary f) {
  return f == Unary::elu || (f != Unary::affine && !slope_reads_argument(f));
}

enum class Binary : int64_t {
  add,
  subtract,
  multiply,
  divide,
  maximum,
  minimum,
  greater,        // 1 where a > b, else 0
  greater_equal,  // 1 where a >= b, else 0
  keep,           // a where b is not 0, else 0
};
inline constexpr int64_t kBinaries = 9;

/// What a move does with elements that go to one place; of the largest there is no gradient.
enum class Move : int64_t { copy, sum, largest };
inline constexpr int64_t kMoves = 3;

/// Elements of a buffer from `offset` on; of a weight, the same for all samples, if `buffer` is -1 - (its number).
struct Ref {
  int64_t buffer, offset;

  NODESHAPE_SMALL bool is_weight() const { return buffer < 0; }
  NODESHAPE_SMALL int64_t weight() const { return -1 - buffer; }
};

inline constexpr int kMostDims = 6;
inline constexpr int kLayerNumbers = 1 + 3 * kMostDims;
inline constexpr int kLayerConstants = 3;

/// Strided rows: of each index (i_0, ...) below `sizes`, elements sum_d i_d a[d] and sum_d i_d b[d].
struct Strides {
  int64_t dims;
  int64_t sizes[kMostDims], a[kMostDims], b[kMostDims];
};

struct Layer {
  LayerKind kind;
  int64_t function;
  Ref a, b, out;
  int64_t scratch;       // buffer of what forward leaves to vjp: of norm [groups, 2], of conv the framed input; or -1
  int64_t weight, bias;  // numbers of weights, or -1
  double c[kLayerConstants];
  union {
    int64_t n[kLayerNumbers];
    struct {
      int64_t positions, in, out;
      int64_t row, column;  // of the weight: strides of its outputs and its inputs
    } linear;
    struct {
      int64_t count;
    } unary;
    Strides strides;  // binary: out is dense; move: a and out, of Move
    struct {
      int64_t groups, size;  // elements of a group
      int64_t inner, count;  // element e has scale and shift (e / inner) % count
    } norm;
    struct {
      int64_t in, height, width, out, kernel_height, kernel_width, pad_height, pad_width, dilation_height,
          dilation_width, groups;
    } conv;
    struct {
      int64_t batch, rows, depth, columns;
      int64_t a[3], b[3];  // strides of (batch, row, depth) and (batch, depth, column)
    } matmul;
  };

  // What the backward pass does with the cotangent of a and b: first set the whole buffer to zero; add to what is
  // there.
  bool live;  // whether anything depends on `out`
  bool zero_a, add_a, zero_b, add_b;

  /// Whether it copies a row of elements, as they are, from one buffer to another.
  NODESHAPE_SMALL bool is_copy() const {
    return kind == LayerKind::move && Move(function) == Move::copy && !a.is_weight() && c[0] == 1 &&
           strides.dims == 1 && strides.a[0] == 1 && strides.b[0] == 1;
  }
};

struct Buffer {
  int64_t size;
  int64_t brief;      // place, in elements per sample, where buffers share memory once they have been read
  int64_t kept;       // place where all are kept for the backward pass
  int64_t cotangent;  // place of dL/d(buffer)
  bool read;          // by the backward pass
};

/// How a weight's gradient is gathered.
struct WeightUse {
  int64_t size;
  int64_t rows, columns;  // of the matrix of a linear layer, 0 if it is none
  bool lanes;             // element by element; so is a convolution's, or as the device likes
};

struct Program {
  int64_t buffer_count, layer_count, weight_count;
  int64_t result;  // buffer of dy/dt, which no layer reads
  const Buffer* buffers;
  const Layer* layers;
  const WeightUse* weights;
  int64_t brief, kept, cotangents;  // elements per sample of each kind of memory
  int64_t scratch;                  // elements per sample that a vjp needs besides
  bool zero_state;                  // whether dy/dt does not depend on the state
  bool uses_time;                   // whether it depends on the time
  double operations;                // multiplications and the like, per sample and evaluation
  ConvModel conv;                   // what it is, without parameters; no channels if it is something else

  NODESHAPE_SMALL int64_t state() const { return buffers[0].size; }
  NODESHAPE_SMALL int64_t parameters() const {
    int64_t total = 0;
    for (int64_t k = 0; k < weight_count; ++k) total += weights[k].size;
    return total;
  }
};

inline constexpr int64_t kMostStages = 16;

/// Y_i = y + h sum_{j<=i} a_ij F_j, y' = y + h sum_i b_i F_i, F_i = f(t + c_i h, Y_i).
struct Tableau {
  int64_t stages;
  const double* a;  // [stages, stages], lower triangular
  const double* b;
  const double* c;
  bool used[kMostStages];  // whether the solution depends on a stage

  NODESHAPE_SMALL double at(int64_t i, int64_t j) const { return a[i * stages + j]; }
  NODESHAPE_SMALL bool is_explicit() const {
    for (int64_t i = 0; i < stages; ++i)
      if (at(i, i) != 0) return false;
    return true;
  }
  NODESHAPE_SMALL int64_t used_stages() const {
    int64_t total = 0;
    for (int64_t i = 0; i < stages; ++i) total += used[i];
    return total;
  }
  /// States that a step keeps for the backward pass: the one it starts from, or all stages where they are equations.
  NODESHAPE_SMALL int64_t kept() const { return is_explicit() ? 1 : stages; }
};

/// What the solver of programs is given.
struct ProgramModel {
  const Program& program;
  const void* const* weights;  // [weights], float or double
  Tableau tableau;
};

}  // namespace nodeshape
