// Kernels that carry samples through time, a team of threads each, and how a batch is shared out to teams.
#pragma once

#include "arena.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "../scheme.h"

namespace nodeshape::cuda {

/// What a team may use: shared memory, as many bytes of global memory as do not fit there; and what its blocks wait at.
struct TeamMemory {
  int64_t shared_bytes;  // of the arena
  char* global;
  int64_t global_bytes;
  GridBarrier* barriers;  // null where blocks are alone
  int reduction_width;

  NODESHAPE_INLINE Header header(int64_t team) const {
    return {barriers == nullptr ? nullptr : barriers + team, reduction_width};
  }
  NODESHAPE_INLINE Arena arena(int64_t team) const {
    char* shared = shared_memory() + (barriers == nullptr ? scratch_bytes(reduction_width) : 0);
    return Arena(shared, shared_bytes, global + team * global_bytes);
  }
};

/// The loop in theta, as the kernels below run a loop in time: forward() and backward() of a sample, and what they take
/// from an arena besides the dynamics, measured by the same calls of take().
struct ThetaSteps {
  ThetaSteps uploaded(const Launch&) const { return *this; }

  template <class D>
  static void take(D& f, Arena& arena, const ForwardProblem<typename D::Scalar>& problem) {
    using T = typename D::Scalar;
    const StageSolver<T> stages(arena, f.size(), 1, problem.stage, problem.grid.theta == 0.0);
    arena.take<T>(f.size());  // the state
  }
  template <class D>
  static void take(D& f, Arena& arena, const BackwardProblem<typename D::Scalar>& problem) {
    const BackwardSweep<D, Arena> sweep(f, arena, problem, Group{0, 1}, nullptr);
  }
  template <class D>
  NODESHAPE_INLINE void forward(D& f, Arena& arena, const ForwardProblem<typename D::Scalar>& problem,
                                int64_t sample) const {
    solve_forward(f, arena, problem, Group{sample, 1});
  }
  template <class D>
  NODESHAPE_INLINE void backward(D& f, Arena& arena, const BackwardProblem<typename D::Scalar>& problem, int64_t sample,
                                 double* grad_t) const {
    BackwardSweep<D, Arena>(f, arena, problem, Group{sample, 1}, grad_t).run();
  }
};

template <class D, class Steps>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const __grid_constant__ typename D::Weights weights, const __grid_constant__ Steps steps,
                   const __grid_constant__ ForwardProblem<typename D::Scalar> problem, TeamMemory memory) {
  join(memory.header(blockIdx.x));
  for (int64_t sample = blockIdx.x; sample < problem.samples; sample += gridDim.x) {
    Arena arena = memory.arena(blockIdx.x);
    if (leads()) problem.failures[sample] = Failure{};
    D dynamics(weights, arena, nullptr, false);
    steps.forward(dynamics, arena, problem, sample);
  }
}

/// Parameter gradients are summed within chunks of samples, each a row of `rows`, and then over chunks, in an order
/// that depends on the batch alone.
template <class D, class Steps>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(const __grid_constant__ typename D::Weights weights, const __grid_constant__ Steps steps,
                    const __grid_constant__ BackwardProblem<typename D::Scalar> problem, TeamMemory memory,
                    int64_t chunks, typename D::Scalar* rows, double* time_rows) {
  using T = typename D::Scalar;
  const int64_t elements = weights.gradient_elements(), times = problem.grid.count;
  join(memory.header(blockIdx.x));
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    T* row = rows + chunk * elements;
    double* time_row = time_rows + chunk * times;
    detail::fill(elements, T(0), row);
    detail::fill(times, 0.0, time_row);
    Arena arena = memory.arena(blockIdx.x);
    D dynamics(weights, arena, row, true);
    bool failed = false;
    for (int64_t n = problem.samples * chunk / chunks; n < problem.samples * (chunk + 1) / chunks; ++n) {
      if (leads()) problem.failures[n] = Failure{};
      barrier();
      Arena rest = arena;
      steps.backward(dynamics, rest, problem, n, time_row);
      barrier();
      if (problem.failures[n].step < 0) continue;
      failed = true;
      detail::fill(dynamics.sample(), T(__builtin_nan("")), problem.grad_y0 + n * dynamics.sample());
    }
    dynamics.take_gradient(row);
    if (!failed) continue;
    detail::fill(elements, T(__builtin_nan("")), row);
    detail::fill(times, __builtin_nan(""), time_row);
  }
}

/// sums[i] = the sum over chunks of rows[chunk][i], in order.
template <class T>
__global__ void sum_chunks(int64_t chunks, int64_t elements, const T* rows, T* sums) {
  each_of_grid(elements, [=](int64_t i) {
    T sum = 0;
#pragma unroll 4
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += rows[chunk * elements + i];
    sums[i] = sum;
  });
}

/// One block: report the samples that failed first, if any did and no earlier report waits.
static __global__ void report_failures(int64_t samples, const Failure* failures, bool backward, double tolerance,
                                       double drift_tolerance, Report* report) {
  join({nullptr, int(blockDim.x)});
  const int failed = total<int>(samples, [=](int64_t n) { return int(failures[n].step >= 0); });
  if (failed == 0 || !leads()) return;
  const int raised = report->raised;
  if (atomicCAS(&report->begun, raised, raised + 1) != raised) return;
  __threadfence_system();
  report->failed = first_failures(failures, samples, backward);
  report->samples = samples;
  report->tolerance = tolerance;
  report->drift_tolerance = drift_tolerance;
  __threadfence_system();
  report->written = raised + 1;
}

template <class Problem>
void launch_report(const Problem& problem, bool backward, double drift_tolerance, const Launch& on) {
  launch(report_failures, Teams{1, 1, kMostThreads}, sizeof(Header) + scratch_bytes(kMostThreads), on, problem.samples,
         problem.failures, backward, problem.stage.tolerance, drift_tolerance, on.report);
}

/// A grid in device memory.
inline Grid uploaded(const Grid& grid, const Launch& on) {
  Upload upload;
  for (int64_t j = 0; j < grid.count; ++j) upload.add(grid.times[j]);
  for (int64_t j = 0; j + 1 < grid.count; ++j) upload.add(grid.steps[j]);
  const char* words = static_cast<const char*>(upload.to_device(on));
  return {reinterpret_cast<const double*>(words), grid.count,
          reinterpret_cast<const int64_t*>(words + grid.count * sizeof(double)), grid.theta};
}

/// How a kernel runs.
struct Plan {
  Teams teams;
  TeamMemory memory;
  int64_t shared_bytes;
};

/// How `kernel` runs for `tasks` samples or chunks, with threads enough for `work` elements side by side;
/// take(dynamics, arena) takes what a team will take besides its dynamics.
///
/// A team is one block; but where the dynamics do not fit into its shared memory, as many blocks, up to the reduction
/// width, as the GPU has to spare. Where anything lies in global memory, each team has some of its own, so there are as
/// many as run at a time and take tasks in turn.
template <class D, class Take>
Plan plan(const void* kernel, const typename D::Weights& weights, bool with_gradient, int64_t tasks, int64_t work,
          const Launch& on, Take&& take) {
  constexpr int64_t kMostTeams = 65536;
  // Every GPU allows more threads; the tests' shim fewer.
  const int64_t most = min(int64_t(kMostThreads), int64_t(attribute(cudaDevAttrMaxThreadsPerBlock)));
  work = max(work, int64_t(1));
  const int64_t threads = min((work + kWarp - 1) / kWarp * kWarp, most);
  const auto measured = [&](int64_t shared_bytes, bool whole) {
    Arena arena(shared_bytes);
    D dynamics(weights, arena, nullptr, with_gradient);
    if (whole) take(dynamics, arena);
    return arena;
  };
  const int64_t reduction_width = threads * min((work + threads - 1) / threads, int64_t(kMostBlocks));
  int64_t besides = int64_t(sizeof(Header)) + scratch_bytes(reduction_width), blocks = 1;
  if (reduction_width > threads && attribute(cudaDevAttrCooperativeLaunch) != 0 &&
      measured(most_shared_bytes() - besides, false).global_bytes() > 0) {
    const int64_t resident = resident_blocks(kernel, int(threads), sizeof(Header));
    const int64_t parts = reduction_width / threads,
                  spare = min(max(resident / max(tasks, int64_t(1)), int64_t(1)), parts);
    const int64_t turns = (parts + spare - 1) / spare;
    blocks = (parts + turns - 1) / turns;  // no more than do not shorten the turns
    if (blocks > 1) besides = sizeof(Header);
  }
  const Arena arena = measured(blocks > 1 ? 0 : most_shared_bytes() - besides, true);
  const int64_t shared = besides + arena.shared_bytes();
  int64_t teams = min(tasks, kMostTeams);
  if (arena.global_bytes() > 0) teams = min(teams, resident_blocks(kernel, int(threads), shared) / blocks);
  GridBarrier* barriers = nullptr;
  if (blocks > 1) {
    barriers = on.take<GridBarrier>({teams});
    check(cudaMemsetAsync(barriers, 0, size_t(teams) * sizeof(GridBarrier), on.stream));
  }
  char* global = on.take<char>({teams, arena.global_bytes()});
  return {{teams, int(blocks), int(threads)},
          {arena.shared_bytes(), global, arena.global_bytes(), barriers, int(reduction_width)},
          shared};
}

template <class Weights, class Steps, class T>
void solve(const Weights& weights, int64_t work, const Steps& steps, ForwardProblem<T> problem, const Launch& on) {
  using D = typename Weights::Dynamics;
  if (problem.samples == 0) return;
  const auto kernel = forward_kernel<D, Steps>;
  const Plan how = plan<D>(reinterpret_cast<const void*>(kernel), weights, false, problem.samples, work, on,
                           [&](D& dynamics, Arena& arena) { steps.take(dynamics, arena, problem); });
  problem.grid = uploaded(problem.grid, on);
  problem.failures = on.take<Failure>({problem.samples});
  launch(kernel, how.teams, how.shared_bytes, on, weights, steps.uploaded(on), problem, how.memory);
  launch_report(problem, false, 0.0, on);
}

/// Returns the parameters' gradient, [weights.gradient_elements()] in the kernels' order.
template <class Weights, class Steps, class T>
const T* solve(const Weights& weights, int64_t work, const Steps& steps, BackwardProblem<T> problem, const Launch& on) {
  using D = typename Weights::Dynamics;
  // Constants, so that gradients are the same on every GPU; a large one has about kFewestChunks multiprocessors.
  constexpr int64_t kFewestChunks = 128, kMostChunks = 4096, kRowBytes = int64_t(1) << 27;
  const int64_t elements = weights.gradient_elements(), times = problem.grid.count;
  const int64_t row_bytes = max(elements, int64_t(1)) * int64_t(sizeof(T));
  const int64_t fit = min(max(kRowBytes / row_bytes, kFewestChunks), kMostChunks);
  const int64_t chunks = min(problem.samples, fit);
  T* rows = on.take<T>({chunks + 1, elements});
  T* sums = rows + chunks * elements;
  double* time_rows = on.take<double>({chunks, times});
  if (chunks > 0) {
    const auto kernel = backward_kernel<D, Steps>;
    const Plan how = plan<D>(reinterpret_cast<const void*>(kernel), weights, true, chunks, work, on,
                             [&](D& dynamics, Arena& arena) { steps.take(dynamics, arena, problem); });
    problem.grid = uploaded(problem.grid, on);
    problem.failures = on.take<Failure>({problem.samples});
    launch(kernel, how.teams, how.shared_bytes, on, weights, steps.uploaded(on), problem, how.memory, chunks, rows,
           time_rows);
    launch_report(problem, true, problem.drift_tolerance, on);
  }
  launch_over(elements, sum_chunks<T>, on, chunks, elements, rows, sums);
  launch_over(times, sum_chunks<double>, on, chunks, times, time_rows, problem.grad_t);
  return sums;
}

/// A model's file brings
///     prepare<T>(model, on)                            its weights as the kernels read them
///     work(weights)                                    elements that a team works on side by side
///     finish(weights, row, gradients, model, on)       from solve()'s row to the parameters' gradients
template <class Model, class T>
void forward(const Model& model, ForwardProblem<T> problem, const Launch& on) {
  const auto weights = prepare<T>(model, on);
  solve(weights, work(weights), ThetaSteps{}, problem, on);
}

template <class Model, class T>
void backward(const Model& model, BackwardProblem<T> problem, const std::vector<T*>& gradients, const Launch& on) {
  const auto weights = prepare<T>(model, on);
  const T* row = solve(weights, work(weights), ThetaSteps{}, problem, on);
  finish(weights, row, gradients, model, on);
}

}  // namespace nodeshape::cuda
