// What the loops in time ask of a dynamics D. It knows f of a slot and nothing of time stepping.
//
// A slot holds one sample, or kSamples of them side by side where no stage is iterated; fewer in a batch's last slot,
// whose `members` say how many.
#pragma once

#include <concepts>
#include <cstdint>

#include "stage.h"

namespace nodeshape::NODESHAPE_TARGET {

template <class D>
concept Dynamics = requires(D& f, const D& known, const typename D::Scalar* from, typename D::Scalar* to,
                            const typename D::Scalar* const* rows, const int* members, int count, double number,
                            const Batch<typename D::Scalar>& batch) {
  { D::kSamples } -> std::convertible_to<int>;
  /// Elements of a slot's state as D keeps it, a multiple of the vector.
  { known.size() } -> std::same_as<int64_t>;
  /// Elements of a sample in tensors, and in `stored` where stages are kept.
  { known.sample() } -> std::same_as<int64_t>;
  { known.kept() } -> std::same_as<int64_t>;
  /// A slot's states from and to a tensor's layout; cotangents, zero for members that a slot lacks.
  known.read(from, count, to);
  known.write(from, count, to);
  f.read_cotangent(from, count, to);
  /// As write(), for a checkpoint in `stored`.
  known.pack(from, count, to);
  /// What recall() needs of slot 0, linearised about `from`, for `stored`.
  f.keep(0, from, count, to);
  /// The state that keep(), or pack() where checkpoints are compared, left in a row.
  known.unpack(from, count, to);
  /// out = f(t, in), and linearises each slot about its `in`, which stays in place.
  f.eval(number, batch);
  /// As eval(), given what keep() left in rows[s]; in[s] is unpacked from it.
  f.recall(number, rows, members, batch);
  /// out = J^T in at the slot's linearisation.
  f.vjp(batch);
  /// dL/dp += h (df/dp)^T w, where w is each slot's latest argument of vjp(); at t, of `count` slots.
  f.accumulate(number, number, count);
  /// h w . df/dt, summed over the slots of the latest accumulate().
  { known.time_product() } -> std::same_as<double>;
};

/// With linearisations side by side, one for each stage of a step.
template <class D>
concept StagedDynamics = Dynamics<D> && requires(D& f, int stage, const Batch<typename D::Scalar>& batch) {
  /// eval() and vjp() from now on are about this linearisation.
  f.record(stage);
  /// As vjp(), and dL/dp += (df/dp)^T in.
  f.pull(batch);
  /// in . df/dt, summed over the slots of the latest pull().
  { f.pulled_time() } -> std::same_as<double>;
};

/// That can leave what the backward pass reads of an evaluation in memory of the caller's.
template <class D>
concept TapedDynamics = StagedDynamics<D> && requires(D& f, const D& known, typename D::Scalar* memory) {
  /// Elements of a slot's tape, which begins with the state.
  { known.tape() } -> std::same_as<int64_t>;
  /// Where a tape has f(t, y), or null if nothing reads it.
  { known.slope(memory) } -> std::same_as<typename D::Scalar*>;
  /// The linearisation of record() is in this tape from now on: made by the next eval(), or by an earlier one.
  f.attach(memory);
};

/// Whose samples each have a time of their own. A sample has a place: a lane of a slot, or a slot.
template <class D>
concept PlacedDynamics =
    StagedDynamics<D> && requires(D& f, const D& known, const typename D::Scalar* from, typename D::Scalar* to,
                                  typename D::Scalar* const* slots, const Batch<typename D::Scalar>& batch) {
      /// numbers[place], for each of the elements i, i + 1, ... of a slot.
      known.factor(from, 0, int64_t(0));
      /// A place's sample into its slot, and out of it; and added with a factor.
      known.put(from, 0, slots);
      known.get(slots, 0, to);
      known.add(slots, 0, *from, to);
      known.add_to(from, 0, *from, slots);
      /// As eval(), with a time for each place.
      f.eval_at(from, batch);
    };

}  // namespace nodeshape::NODESHAPE_TARGET
