// Shares a batch out to threads: groups of samples for the forward solve, chunks of groups for the backward sweep.
#pragma once

#include "team.h"
#include "../scheme.h"

namespace nodeshape::NODESHAPE_TARGET {

/// How many threads `evaluations` of a dynamics are worth, given its cost(), which is roughly the nanoseconds of one
/// evaluation of a slot: waking a thread takes microseconds, and a hundred where its core is shared.
template <class W>
int64_t worthwhile(const W& weights, double evaluations, int64_t most) {
  constexpr double kWorthAThread = 100e3;
  const double threads = weights.cost() * evaluations / kWorthAThread;
  return threads < double(most) ? larger(1, int64_t(threads)) : most;
}

/// Slots that cost no more together than one.
template <class W>
int64_t least_group(const W& weights) {
  if constexpr (requires { weights.least_group(); }) return weights.least_group();
  return 1;
}

/// Calls solve(dynamics, arena, group) for groups of samples. Results do not depend on how samples are grouped, so
/// groups may be as many as keep all threads busy.
template <class D, class T, class Solve>
void forward_groups(const typename D::Weights& weights, const ForwardProblem<T>& problem, const Executor& all,
                    Solve&& solve) {
  const int64_t slots = ceil_div(problem.samples, D::kSamples);
  const Executor executor{worthwhile(weights, double(slots) * double(problem.grid.total_steps()), all.threads), all.run,
                          all.judge};
  if constexpr (requires(D f, Team& team, Arena& arena) { f.join(team, arena); }) {
    // What threads pass to each other costs as much as they gain by sharing out a small map.
    constexpr double kWorthATeam = 250e3;
    const int64_t size = smaller(executor.threads, weights.pieces());
    if (slots == 1 && size > 1 && weights.cost() >= kWorthATeam)
      return Team::gather(executor, size, [&](Team& team) {
        Arena arena;
        D dynamics(weights, arena, 1, false);
        dynamics.join(team, arena);
        solve(dynamics, arena, Group{0, 1});
      });
  }
  const int64_t group = larger(least_group(weights), smaller(weights.group(), ceil_div(slots, executor.threads)));
  share(executor, ceil_div(slots, group), [&](int64_t task, Arena& arena) {
    const Group members{task * group * D::kSamples, int(smaller(group, slots - task * group))};
    D dynamics(weights, arena, members.count, false);
    solve(dynamics, arena, members);
  });
}

template <class D, class T>
void forward(const typename D::Weights& weights, const ForwardProblem<T>& problem, const Executor& all) {
  forward_groups<D>(weights, problem, all,
                    [&](D& f, Arena& arena, Group group) { solve_forward(f, arena, problem, group); });
}

/// to[count] = the sum of `chunks` rows.
template <class T>
void sum_chunks(const Executor& all, int64_t chunks, int64_t count, const T* rows, T* to) {
  constexpr int64_t kSlice = 4096, kWorthAThread = 1 << 18;
  const Executor executor{larger(1, smaller(all.threads, chunks * count / kWorthAThread)), all.run, all.judge};
  share(executor, ceil_div(count, kSlice), [&](int64_t slice, Arena&) {
    const int64_t end = smaller(count, (slice + 1) * kSlice);
    for (int64_t i = slice * kSlice; i < end; ++i) to[i] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = slice * kSlice; i < end; ++i) to[i] += rows[chunk * count + i];
  });
}

/// Calls sweep(dynamics, arena, group, gradient of the times) for groups of samples. Parameter gradients are summed
/// within chunks and then over chunks, in an order that depends on the problem alone, so that they are the same for any
/// number of threads.
template <class D, class T, class Sweep>
void backward_groups(const typename D::Weights& weights, const BackwardProblem<T>& problem, const Executor& all,
                     Sweep&& sweep) {
  constexpr int64_t kChunks = 64, kWantedChunks = 8;
  const int64_t slots = ceil_div(problem.samples, D::kSamples), parameters = weights.parameters(),
                times = problem.grid.count;
  const double evaluations = 3.0 * double(slots) * double(problem.grid.total_steps());
  const int64_t group =
      larger(least_group(weights), smaller(weights.group(), slots / worthwhile(weights, evaluations, kWantedChunks)));
  const int64_t groups = ceil_div(slots, group), chunks = smaller(groups, kChunks);
  const Executor executor{worthwhile(weights, evaluations, all.threads), all.run, all.judge};
  Arena shared;
  T* rows = shared.take<T>(chunks * parameters);
  double* time_rows = shared.zeros<double>(chunks * times);

  share(executor, chunks, [&](int64_t chunk, Arena& arena) {
    D dynamics(weights, arena, int(group), true);
    for (int64_t g = groups * chunk / chunks; g < groups * (chunk + 1) / chunks; ++g) {
      const Arena::Mark mark = arena.mark();
      const Group members{g * group * D::kSamples, int(smaller(group, slots - g * group))};
      sweep(dynamics, arena, members, time_rows + chunk * times);
      arena.release(mark);
    }
    dynamics.take_gradient(rows + chunk * parameters);
  });

  sum_chunks(executor, chunks, parameters, rows, problem.grad_parameters);
  for (int64_t j = 0; j < times; ++j) {
    problem.grad_t[j] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) problem.grad_t[j] += time_rows[chunk * times + j];
  }
}

template <class D, class T>
void backward(const typename D::Weights& weights, const BackwardProblem<T>& problem, const Executor& all) {
  backward_groups<D>(weights, problem, all, [&](D& f, Arena& arena, Group group, double* grad_t) {
    BackwardSweep<D, Arena>(f, arena, problem, group, grad_t).run();
  });
}

}  // namespace nodeshape::NODESHAPE_TARGET
