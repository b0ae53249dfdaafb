// Tasks shared out to torch's threads.
#pragma once

#include "arena.h"
#include "../problem.h"

namespace nodeshape::NODESHAPE_TARGET {

NODESHAPE_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NODESHAPE_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NODESHAPE_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/// Runs body(task, arena) for every task; each thread takes the next one there is and keeps its arena throughout.
template <class Body>
void share(const Executor& executor, int64_t tasks, Body&& body) {
  struct Context {
    Body* body;
    int64_t tasks;
    int64_t next;
  } context{&body, tasks, 0};
  const auto worker = [](int64_t, void* argument) {
    Context& context = *static_cast<Context*>(argument);
    Arena arena;
    while (true) {
      const int64_t task = __atomic_fetch_add(&context.next, 1, __ATOMIC_RELAXED);
      if (task >= context.tasks) return;
      const Arena::Mark mark = arena.mark();
      (*context.body)(task, arena);
      arena.release(mark);
    }
  };
  const int64_t threads = smaller(executor.threads, tasks);
  if (threads <= 1)
    worker(0, &context);
  else
    executor.run(threads, worker, &context);
}

}  // namespace nodeshape::NODESHAPE_TARGET
