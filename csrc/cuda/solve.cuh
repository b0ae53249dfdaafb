// Kernels that carry samples through time, a block each, and how a batch is shared out to blocks.
#pragma once

#include "arena.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "../scheme.h"

namespace nodeshape::cuda {

/// What a block may use: shared memory of its own, and as many bytes of global memory as do not fit there.
struct BlockMemory {
  int64_t shared_bytes;
  char* global;
  int64_t global_bytes;

  NODESHAPE_INLINE Arena arena(int64_t block) const {
    return Arena(shared_memory() + kScratchBytes, shared_bytes, global + block * global_bytes);
  }
};

template <class D>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const __grid_constant__ typename D::Weights weights,
                   const __grid_constant__ ForwardProblem<typename D::Scalar> problem, BlockMemory memory) {
  for (int64_t sample = blockIdx.x; sample < problem.samples; sample += gridDim.x) {
    Arena arena = memory.arena(blockIdx.x);
    if (leads()) problem.failures[sample] = Failure{};
    D dynamics(weights, arena, nullptr, false);
    solve_forward(dynamics, arena, problem, Group{sample, 1});
  }
}

/// Parameter gradients are summed within chunks of samples, each a row of `rows`, and then over chunks, in an order
/// that depends on the batch alone.
template <class D>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(const __grid_constant__ typename D::Weights weights,
                    const __grid_constant__ BackwardProblem<typename D::Scalar> problem, BlockMemory memory,
                    int64_t chunks, typename D::Scalar* rows, double* time_rows) {
  using T = typename D::Scalar;
  const int64_t numbers = weights.gradient_numbers(), times = problem.grid.count;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    T* row = rows + chunk * numbers;
    double* time_row = time_rows + chunk * times;
    detail::fill(numbers, T(0), row);
    detail::fill(times, 0.0, time_row);
    Arena arena = memory.arena(blockIdx.x);
    D dynamics(weights, arena, row, true);
    bool failed = false;
    for (int64_t n = problem.samples * chunk / chunks; n < problem.samples * (chunk + 1) / chunks; ++n) {
      if (leads()) problem.failures[n] = Failure{};
      barrier();
      Arena rest = arena;
      BackwardSweep<D, Arena>(dynamics, rest, problem, Group{n, 1}, time_row).run();
      barrier();
      if (problem.failures[n].step < 0) continue;
      failed = true;
      detail::fill(dynamics.sample(), T(__builtin_nan("")), problem.grad_y0 + n * dynamics.sample());
    }
    dynamics.take_gradient(row);
    if (!failed) continue;
    detail::fill(numbers, T(__builtin_nan("")), row);
    detail::fill(times, __builtin_nan(""), time_row);
  }
}

/// sums[i] = the sum over chunks of rows[chunk][i], in order.
template <class T>
__global__ void sum_chunks(int64_t chunks, int64_t numbers, const T* rows, T* sums) {
  each_of_grid(numbers, [=](int64_t i) {
    T sum = 0;
#pragma unroll 4
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += rows[chunk * numbers + i];
    sums[i] = sum;
  });
}

/// One block: report the samples that failed first, if any did and no earlier report waits.
static __global__ void report_failures(int64_t samples, const Failure* failures, bool backward, double tolerance,
                                       double drift_tolerance, Report* report) {
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
  int64_t blocks;
  int threads;
  BlockMemory memory;

  int64_t shared_bytes() const { return kScratchBytes + memory.shared_bytes; }
};

/// How `kernel` runs for `tasks` samples or chunks, with threads enough for `work` numbers side by side; take(arena)
/// takes from an arena that measures what a block will take. Where that spills into global memory, each block has some
/// of its own, so there are as many as run at a time and take tasks in turn; no result depends on their number.
template <class Take>
Plan plan(const void* kernel, int64_t tasks, int64_t work, const Launch& on, Take&& take) {
  constexpr int64_t kMostBlocks = 65536;
  const int64_t warps = (work + kWarp - 1) / kWarp;
  const int threads = kWarp * int(min(max(warps, int64_t(1)), int64_t(kMostThreads / kWarp)));
  Arena arena(most_shared_bytes() - kScratchBytes);
  take(arena);
  Plan how{kMostBlocks, threads, {arena.shared_bytes(), nullptr, arena.global_bytes()}};
  if (how.memory.global_bytes > 0) how.blocks = resident_blocks(kernel, threads, how.shared_bytes());
  how.blocks = min(how.blocks, tasks);
  how.memory.global = static_cast<char*>(on.scratch(how.blocks * how.memory.global_bytes));
  return how;
}

template <class Weights, class T>
void solve(const Weights& weights, int64_t work, ForwardProblem<T> problem, const Launch& on) {
  using D = typename Weights::Dynamics;
  if (problem.samples == 0) return;
  const auto kernel = reinterpret_cast<const void*>(forward_kernel<D>);
  const Plan how = plan(kernel, problem.samples, work, on, [&](Arena& arena) {
    const D dynamics(weights, arena, nullptr, false);
    const StageSolver<T> stages(arena, dynamics.size(), 1, problem.stage, problem.grid.theta == 0.0);
    arena.take<T>(dynamics.size());  // the state
  });
  problem.grid = uploaded(problem.grid, on);
  problem.failures = static_cast<Failure*>(on.scratch(problem.samples * sizeof(Failure)));
  launch(forward_kernel<D>, how.blocks, how.threads, how.shared_bytes(), on, weights, problem, how.memory);
  launch(report_failures, 1, kMostThreads, kScratchBytes, on, problem.samples, problem.failures, false,
         problem.stage.tolerance, 0.0, on.report);
}

/// Returns the parameters' gradient, [weights.gradient_numbers()] in the kernels' order.
template <class Weights, class T>
const T* solve(const Weights& weights, int64_t work, BackwardProblem<T> problem, const Launch& on) {
  using D = typename Weights::Dynamics;
  // Constants, so that gradients are the same on every GPU; a large one has about kFewestChunks multiprocessors.
  constexpr int64_t kFewestChunks = 128, kMostChunks = 4096, kRowBytes = int64_t(1) << 27;
  const int64_t numbers = weights.gradient_numbers(), times = problem.grid.count;
  const int64_t fit = min(max(kRowBytes / (numbers * int64_t(sizeof(T))), kFewestChunks), kMostChunks);
  const int64_t chunks = min(problem.samples, fit);
  T* rows = static_cast<T*>(on.scratch((chunks + 1) * numbers * sizeof(T)));
  T* sums = rows + chunks * numbers;
  double* time_rows = static_cast<double*>(on.scratch(chunks * times * sizeof(double)));
  if (chunks > 0) {
    const auto kernel = reinterpret_cast<const void*>(backward_kernel<D>);
    const Plan how = plan(kernel, chunks, work, on, [&](Arena& arena) {
      D dynamics(weights, arena, nullptr, true);
      const BackwardSweep<D, Arena> sweep(dynamics, arena, problem, Group{0, 1}, nullptr);
    });
    problem.grid = uploaded(problem.grid, on);
    problem.failures = static_cast<Failure*>(on.scratch(problem.samples * sizeof(Failure)));
    launch(backward_kernel<D>, how.blocks, how.threads, how.shared_bytes(), on, weights, problem, how.memory, chunks,
           rows, time_rows);
    launch(report_failures, 1, kMostThreads, kScratchBytes, on, problem.samples, problem.failures, true,
           problem.stage.tolerance, problem.drift_tolerance, on.report);
  }
  launch_over(numbers, sum_chunks<T>, on, chunks, numbers, rows, sums);
  launch_over(times, sum_chunks<double>, on, chunks, times, time_rows, problem.grad_t);
  return sums;
}

/// A model's file brings
///     prepare<T>(model, on)                            its weights as the kernels read them
///     work(weights)                                    numbers that a block works on side by side
///     finish(weights, row, gradients, model, on)       from solve()'s row to the parameters' gradients
template <class Model, class T>
void forward(const Model& model, ForwardProblem<T> problem, const Launch& on) {
  const auto weights = prepare<T>(model, on);
  solve(weights, work(weights), problem, on);
}

template <class Model, class T>
void backward(const Model& model, BackwardProblem<T> problem, const std::vector<T*>& gradients, const Launch& on) {
  const auto weights = prepare<T>(model, on);
  const T* row = solve(weights, work(weights), problem, on);
  finish(weights, row, gradients, model, on);
}

}  // namespace nodeshape::cuda
