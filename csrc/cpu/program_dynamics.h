// Programs as dynamics of the time loops: a tile of samples that goes through time as one, for explicit steps; single
// samples, which iterate their stages each to its own tolerance and meet only in the lanes of an evaluation; or a few
// samples, each in its own rows.
#pragma once

#include "layers.h"
#include "layers_rows.h"
#include "share.h"
#include "../stage.h"

namespace nodeshape::NODESHAPE_TARGET {

template <class T>
struct ProgramWeights {
  const Program& program;
  const T* const* weights;
  int64_t tapes;          // linearisations that are kept side by side
  int64_t samples;        // of a slot, in vectors, or 0 where a slot is a sample
  bool rows;              // whether it has the lanes to itself
  bool attached = false;  // whether tapes are where the time loop says

  int64_t parameters() const { return program.parameters(); }
  int64_t group() const { return samples > 0 ? 1 : kMaxGroup; }
  /// Samples in lanes fill them.
  int64_t least_group() const { return samples > 0 || rows ? 1 : smaller(kMaxGroup, kLanes<T>); }
  double cost() const {
    const double vectors = samples > 0 ? double(samples) : (rows ? 1.2 : 2.0) / double(kLanes<T>);
    return 50 + 0.6 * vectors * program.operations;
  }
};

/// Whether there are too few samples to fill the lanes with.
template <class T>
bool are_few(int64_t samples) {
  return 2 * samples <= kLanes<T>;
}

/// A slot is `Vectors` vectors of samples.
template <class T, int Vectors>
class ProgramTile {
  static constexpr int64_t kWidth = Vectors * kLanes<T>;

 public:
  using Scalar = T;
  using Weights = ProgramWeights<T>;
  static constexpr int kSamples = int(kWidth);

  ProgramTile(const Weights& weights, Arena& arena, int, bool with_gradient)
      : sample_(weights.program.state()),
        layers_(weights.program, weights.weights, arena, kWidth, with_gradient ? weights.tapes : 1, with_gradient,
                weights.attached) {
    if (!with_gradient) return;
    w_ = arena.take<T>(size());
    ignored_ = arena.take<T>(size());
  }

  int64_t size() const { return sample_ * kWidth; }
  int64_t sample() const { return sample_; }
  int64_t kept() const { return sample_; }

  /// Lanes beyond the members repeat the last one, and so cannot be worse than it.
  void read(const T* tensor, int members, T* y) const {
    transpose<T>(members, sample_, tensor, sample_, y, kWidth);
    if (members == kWidth) return;
    for (int64_t i = 0; i < sample_; ++i)
      for (int64_t lane = members; lane < kWidth; ++lane) y[i * kWidth + lane] = y[i * kWidth + members - 1];
  }
  void read_cotangent(const T* tensor, int members, T* lambda) {
    layers_.set_members(members);
    read(tensor, members, lambda);
    for (int64_t i = 0; i < sample_ && members < kWidth; ++i)
      for (int64_t lane = members; lane < kWidth; ++lane) lambda[i * kWidth + lane] = 0;
  }
  void write(const T* y, int members, T* tensor) const { transpose<T>(sample_, members, y, kWidth, tensor, sample_); }
  void pack(const T* y, int members, T* row) const { write(y, members, row); }
  /// A full slot as it is.
  void keep(int, const T* y, int members, T* row) const {
    if (members < kWidth) return write(y, members, row);
    __builtin_memcpy(row, y, size() * sizeof(T));
  }
  void unpack(const T* row, int members, T* y) const {
    if (members < kWidth) return read(row, members, y);
    __builtin_memcpy(y, row, size() * sizeof(T));
  }

  void record(int stage) { tape_ = stage; }
  void eval(double t, const Batch<T>& batch) {
    T times[kWidth];
    for (T& time : times) time = T(t);
    eval_at(times, batch);
  }
  NODESHAPE_OUTLINE void eval_at(const T* times, const Batch<T>& batch) {
    layers_.eval(tape_, times, const_cast<T*>(batch.in[0]), batch.out[0]);
  }
  void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }
  int64_t tape() const { return layers_.tape() * kWidth; }
  T* slope(T* memory) const { return layers_.result_place() < 0 ? nullptr : memory + layers_.result_place() * kWidth; }
  void attach(T* memory) { layers_.attach(tape_, memory); }
  NODESHAPE_OUTLINE void vjp(const Batch<T>& batch) {
    __builtin_memcpy(w_, batch.in[0], size() * sizeof(T));
    layers_.vjp(tape_, batch.in[0], batch.out[0], false);
  }
  NODESHAPE_OUTLINE void pull(const Batch<T>& batch) { layers_.vjp(tape_, batch.in[0], batch.out[0], true); }
  double pulled_time() const { return layers_.time_product(); }

  void accumulate(double, double h, int) {
    const Vec<T> scale = splat(T(h));
    T* w = w_;
    each<T>(size(), [=](int64_t i) { store(w + i, scale * load(w + i)); });
    layers_.vjp(tape_, w_, ignored_, true);
  }
  double time_product() const { return layers_.time_product(); }
  void take_gradient(T* row) { layers_.take_gradient(row); }

  // A place is a lane.
  static NODESHAPE_INLINE Vec<T> factor(const T* numbers, int, int64_t i) { return load(numbers + i % kWidth); }
  template <class Body>
  NODESHAPE_INLINE void sums(int, Body&& body, double* out) const {
    for (int64_t v = 0; v < kWidth; v += kLanes<T>) {
      Vec<T> sum{};
      for (int64_t i = v; i < size(); i += kWidth) sum += body(i);
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) out[v + lane] = double(sum[lane]);
    }
  }
  void put(const T* from, int place, T* const* slots) const {
    for (int64_t e = 0; e < sample_; ++e) slots[0][e * kWidth + place] = from[e];
  }
  void get(const T* const* slots, int place, T* to) const {
    for (int64_t e = 0; e < sample_; ++e) to[e] = slots[0][e * kWidth + place];
  }
  /// to += factor times the place's sample.
  void add(const T* const* slots, int place, T factor, T* to) const {
    for (int64_t e = 0; e < sample_; ++e) to[e] += factor * slots[0][e * kWidth + place];
  }
  void add_to(const T* from, int place, T factor, T* const* slots) const {
    for (int64_t e = 0; e < sample_; ++e) slots[0][e * kWidth + place] += factor * from[e];
  }

 private:
  const int64_t sample_;
  Layers<T> layers_;
  int tape_ = 0;
  T* w_ = nullptr;  // the latest argument of vjp()
  T* ignored_ = nullptr;
};

/// States of slots that are one sample each, padded with zeros to whole vectors.
template <class T>
class SampleStates {
 public:
  explicit SampleStates(int64_t sample) : sample_(sample) {}

  int64_t size() const { return padded<T>(sample_); }
  int64_t sample() const { return sample_; }
  int64_t kept() const { return sample_; }

  void read(const T* tensor, int, T* y) const {
    for (int64_t i = sample_; i < size(); ++i) y[i] = 0;
    __builtin_memcpy(y, tensor, sample_ * sizeof(T));
  }
  void read_cotangent(const T* tensor, int members, T* lambda) const { read(tensor, members, lambda); }
  void write(const T* y, int, T* tensor) const { __builtin_memcpy(tensor, y, sample_ * sizeof(T)); }
  void pack(const T* y, int members, T* row) const { write(y, members, row); }
  void keep(int, const T* y, int members, T* row) const { write(y, members, row); }
  void unpack(const T* row, int members, T* y) const { read(row, members, y); }

 protected:
  const int64_t sample_;
};

/// A slot is one sample, a lane of the tile that a group is evaluated in.
template <class T>
class ProgramSamples : public SampleStates<T> {
  using SampleStates<T>::sample_;

 public:
  using Scalar = T;
  using Weights = ProgramWeights<T>;
  static constexpr int kSamples = 1;
  using SampleStates<T>::size;

  ProgramSamples(const Weights& weights, Arena& arena, int group, bool with_gradient)
      : SampleStates<T>(weights.program.state()),
        width_(padded<T>(group)),
        layers_(weights.program, weights.weights, arena, width_, with_gradient ? weights.tapes : 1, with_gradient) {
    const int64_t tapes = with_gradient ? weights.tapes : 1, rows = sample_ * width_;
    in_ = arena.zeros<T>(tapes * rows);
    out_ = arena.zeros<T>(tapes * rows);
    times_ = arena.take<T>(width_);
    if (!with_gradient) return;
    w_ = arena.zeros<T>(rows);
    pulled_ = arena.take<T>(rows);
  }

  void record(int stage) { tape_ = stage; }

  NODESHAPE_OUTLINE void eval(double t, const Batch<T>& batch) {
    T *in = in_ + tape_ * sample_ * width_, *out = out_ + tape_ * sample_ * width_;
    for (int i = 0; i < batch.count; ++i) {
      scatter(batch.in[i], in, batch.slot[i]);
      if (batch.slot[i] >= seen_) seen_ = batch.slot[i] + 1;
    }
    for (int64_t lane = seen_; lane < width_; ++lane) scatter(batch.in[0], in, lane);  // which nobody reads
    for (int64_t lane = 0; lane < width_; ++lane) times_[lane] = T(t);
    layers_.eval(tape_, times_, in, out);
    for (int i = 0; i < batch.count; ++i) gather(out, batch.slot[i], batch.out[i]);
  }
  void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }

  NODESHAPE_OUTLINE void vjp(const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) scatter(batch.in[i], w_, batch.slot[i]);
    layers_.vjp(tape_, w_, pulled_, false);
    for (int i = 0; i < batch.count; ++i) gather(pulled_, batch.slot[i], batch.out[i]);
  }
  /// Of all slots of the group.
  NODESHAPE_OUTLINE void pull(const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) scatter(batch.in[i], w_, batch.slot[i]);
    silence(batch.count);
    layers_.vjp(tape_, w_, pulled_, true);
    for (int i = 0; i < batch.count; ++i) gather(pulled_, batch.slot[i], batch.out[i]);
  }
  double pulled_time() const { return layers_.time_product(); }

  void accumulate(double, double h, int count) {
    silence(count);
    const Vec<T> scale = splat(T(h));
    T* w = w_;
    each<T>(sample_ * width_, [=](int64_t i) { store(w + i, scale * load(w + i)); });
    layers_.vjp(tape_, w_, pulled_, true);
  }
  double time_product() const { return layers_.time_product(); }
  void take_gradient(T* row) { layers_.take_gradient(row); }

 private:
  void scatter(const T* sample, T* rows, int64_t lane) const {
    for (int64_t e = 0; e < sample_; ++e) rows[e * width_ + lane] = sample[e];
  }
  void gather(const T* rows, int64_t lane, T* sample) const {
    for (int64_t e = 0; e < sample_; ++e) sample[e] = rows[e * width_ + lane];
    for (int64_t e = sample_; e < size(); ++e) sample[e] = 0;
  }
  /// No cotangent for lanes without a sample.
  void silence(int64_t count) {
    for (int64_t e = 0; e < sample_; ++e)
      for (int64_t lane = count; lane < width_; ++lane) w_[e * width_ + lane] = 0;
  }

  const int64_t width_;
  Layers<T> layers_;
  int tape_ = 0;
  int64_t seen_ = 0;     // slots that have ever been evaluated
  T *in_, *out_;         // [tapes, sample, width]
  T* times_;             // [width]
  T* w_ = nullptr;       // [sample, width]
  T* pulled_ = nullptr;  // [sample, width]
};

/// A slot is one sample, whose elements fill the lanes.
template <class T>
class ProgramRows : public SampleStates<T> {
  using SampleStates<T>::sample_;

 public:
  using Scalar = T;
  using Weights = ProgramWeights<T>;
  static constexpr int kSamples = 1;
  using SampleStates<T>::size;

  ProgramRows(const Weights& weights, Arena& arena, int group, bool with_gradient)
      : SampleStates<T>(weights.program.state()),
        layers_(weights.program, weights.weights, arena, group, with_gradient ? weights.tapes : 1, with_gradient) {
    if (!with_gradient) return;
    for (int s = 0; s < group; ++s) {
      w_[s] = arena.take<T>(size());
      ignored_[s] = arena.take<T>(size());
    }
  }

  void record(int stage) { tape_ = stage; }
  void eval(double t, const Batch<T>& batch) {
    T times[kMaxGroup];
    for (T& time : times) time = T(t);
    eval_at(times, batch);
  }
  NODESHAPE_OUTLINE void eval_at(const T* times, const Batch<T>& batch) {
    layers_.eval(tape_, times, batch);
    finish(batch);
  }
  void recall(double t, const T* const*, const int*, const Batch<T>& batch) { eval(t, batch); }
  NODESHAPE_OUTLINE void vjp(const Batch<T>& batch) {
    for (int i = 0; i < batch.count; ++i) __builtin_memcpy(w_[batch.slot[i]], batch.in[i], size() * sizeof(T));
    layers_.vjp(tape_, batch, false);
    finish(batch);
  }
  /// Of all slots of the group.
  NODESHAPE_OUTLINE void pull(const Batch<T>& batch) {
    layers_.vjp(tape_, batch, true);
    finish(batch);
  }
  double pulled_time() const { return layers_.time_product(); }

  void accumulate(double, double h, int count) {
    const Vec<T> scale = splat(T(h));
    Batch<T> batch;
    for (int s = 0; s < count; ++s) {
      T* w = w_[s];
      each<T>(size(), [=](int64_t i) { store(w + i, scale * load(w + i)); });
      batch.add(s, w, ignored_[s]);
    }
    layers_.vjp(tape_, batch, true);
  }
  double time_product() const { return layers_.time_product(); }
  void take_gradient(T* row) { layers_.take_gradient(row); }

  // A place is a slot.
  static NODESHAPE_INLINE Vec<T> factor(const T* numbers, int slot, int64_t) { return splat(numbers[slot]); }
  template <class Body>
  NODESHAPE_INLINE void sums(int, Body&& body, double* out) const {
    Vec<T> sum{};
    int64_t i = 0;
    for (; i + kLanes<T> <= sample_; i += kLanes<T>) sum += body(i);
    double total = double(nodeshape::NODESHAPE_TARGET::sum<T>(sum));
    if (i < sample_) {
      const Vec<T> rest = body(i);
      for (int64_t lane = 0; i + lane < sample_; ++lane) total += double(rest[lane]);
    }
    *out = total;
  }
  void put(const T* from, int place, T* const* slots) const { this->read(from, 1, slots[place]); }
  void get(const T* const* slots, int place, T* to) const { this->write(slots[place], 1, to); }
  void add(const T* const* slots, int place, T factor, T* to) const {
    for (int64_t e = 0; e < sample_; ++e) to[e] += factor * slots[place][e];
  }
  void add_to(const T* from, int place, T factor, T* const* slots) const {
    for (int64_t e = 0; e < sample_; ++e) slots[place][e] += factor * from[e];
  }

 private:
  void finish(const Batch<T>& batch) const {
    for (int i = 0; i < batch.count; ++i)
      for (int64_t e = sample_; e < size(); ++e) batch.out[i][e] = 0;
  }

  RowLayers<T> layers_;
  int tape_ = 0;
  T* w_[kMaxGroup];  // the latest arguments of vjp()
  T* ignored_[kMaxGroup];
};

}  // namespace nodeshape::NODESHAPE_TARGET
