// Tasks shared out to torch's threads.
#pragma once

#include <time.h>

#include "arena.h"
#include "../problem.h"

namespace nodeshape::NODESHAPE_TARGET {

NODESHAPE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NODESHAPE_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NODESHAPE_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// Nanoseconds.
inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return 1e9 * double(time.tv_sec) + double(time.tv_nsec);
}

/// Runs body(task, arena) for every task; each thread takes the next one there is and keeps its arena throughout.
template <class Body>
void share(const Executor& executor, int64_t tasks, Body&& body) {
  static thread_local char me;
  struct Context {
    Body* body;
    int64_t tasks;
    int64_t next;
    const char* caller;
    int64_t taken;  // by the caller
    double ended;   // when the caller had no more
  } context{&body, tasks, 0, &me, 0, 0};
  const auto worker = [](int64_t, void* argument) {
    Context& context = *static_cast<Context*>(argument);
    Arena arena;
    int64_t taken = 0;
    while (true) {
      const int64_t task = __atomic_fetch_add(&context.next, 1, __ATOMIC_RELAXED);
      if (task >= context.tasks) break;
      ++taken;
      const Arena::Mark mark = arena.mark();
      (*context.body)(task, arena);
      arena.release(mark);
    }
    if (context.caller != &me) return;
    context.taken += taken;
    context.ended = now();
  };
  const int64_t threads = smaller(executor.threads, tasks);
  if (threads <= 1) return worker(0, &context);
  const double began = now();
  executor.run(threads, worker, &context);
  if (executor.judge != nullptr && context.taken > 0)
    executor.judge(now() - began, (context.ended - began) * double(tasks) / double(context.taken));
}

}  // namespace nodeshape::NODESHAPE_TARGET
