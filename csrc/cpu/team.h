// Threads that share the work inside one sample's evaluations, where there are not samples enough to share.
//
// The first thread to arrive leads: it runs the time loop and offers each piece of work to the others, which look for
// offers until it has ended. It never waits for a thread that has not taken a piece, so that it does not matter how
// many of the others run at all, or when. One that has taken a piece and lost its core to somebody else holds the
// leader up: after a while of that the leader goes on alone.
#pragma once

#include <sched.h>

#include "share.h"

namespace nodeshape::NODESHAPE_TARGET {

class Team {
 public:
  static constexpr int kMost = 16;

  /// Runs body(team) on one thread with the help of up to `size - 1` others.
  template <class Body>
  static void gather(const Executor& executor, int64_t size, Body&& body) {
    struct Context {
      Body* body;
      Team team;
      int64_t arrived;
    } context{&body, Team(int(smaller(size, kMost))), 0};
    const double began = now();
    executor.run(
        context.team.size_,
        [](int64_t, void* argument) {
          Context& context = *static_cast<Context*>(argument);
          const int64_t member = __atomic_fetch_add(&context.arrived, 1, __ATOMIC_RELAXED);
          if (member > 0) return context.team.help(int(member));
          const Closing closing{context.team};
          const double start = now();
          (*context.body)(context.team);
          context.team.led_ = now() - start;
        },
        &context);
    const Team& team = context.team;
    if (executor.judge != nullptr && team.own_ > 0)
      executor.judge(now() - began - team.led_ + team.together_, team.alone());
  }

  int size() const { return size_; }

  /// Runs body(piece) for the pieces 0 ... size() - 1 and returns when all are done. Only the leader calls it.
  template <class Body>
  void run(Body&& body) {
    if (is_alone_) {
      for (int piece = 0; piece < size_; ++piece) body(piece);
      return;
    }
    const double began = now();
    __atomic_store_n(&body_, static_cast<void*>(&body), __ATOMIC_RELAXED);
    __atomic_store_n(&call_,
                     static_cast<Call>([](void* body, int piece) noexcept { (*static_cast<Body*>(body))(piece); }),
                     __ATOMIC_RELAXED);
    __atomic_store_n(&done_, 0, __ATOMIC_RELAXED);
    const int64_t job = job_ + 1;
    __atomic_store_n(&job_, job, __ATOMIC_RELEASE);
    const int own = take(job, 0);
    const double worked = now();
    for (int idle = 0; __atomic_load_n(&done_, __ATOMIC_ACQUIRE) < size_;) rest(idle);
    const double ended = now();
    own_ += own;
    offered_ += size_;
    worked_ += worked - began;
    together_ += ended - began;
    is_alone_ = together_ > alone() + kPatience;
  }

 private:
  using Call = void (*)(void* body, int piece);
  static constexpr int64_t kClosed = -1;
  static constexpr double kPatience = 1e6;  // nanoseconds that others may hold the leader up

  struct Closing {
    Team& team;
    ~Closing() { __atomic_store_n(&team.job_, kClosed, __ATOMIC_RELEASE); }
  };

  explicit Team(int size) : size_(size) {}

  void help(int member) {
    int64_t seen = 0;
    for (int idle = 0;;) {
      const int64_t job = __atomic_load_n(&job_, __ATOMIC_ACQUIRE);
      if (job == kClosed) return;
      if (job == seen) {
        rest(idle);
        continue;
      }
      take(job, member);
      seen = job;
      idle = 0;
    }
  }

  /// Do the pieces of a job that nobody has taken, one's own first, and say how many. A piece that can be taken is one
  /// of a job that is not over, so that what was read of the job before is still so.
  int take(int64_t job, int member) {
    int taken = 0;
    void* const body = __atomic_load_n(&body_, __ATOMIC_RELAXED);
    const Call call = __atomic_load_n(&call_, __ATOMIC_RELAXED);
    for (int i = 0; i < size_; ++i) {
      const int piece = (member + i) % size_;
      int64_t before = job - 1;
      if (!__atomic_compare_exchange_n(&taken_[piece], &before, job, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        continue;
      call(body, piece);
      __atomic_fetch_add(&done_, 1, __ATOMIC_RELEASE);
      ++taken;
    }
    return taken;
  }

  /// Nanoseconds that all jobs would have taken the leader.
  double alone() const { return own_ > 0 ? worked_ * double(offered_) / double(own_) : 0; }

  static void rest(int& idle) {
    if (++idle % 4096 == 0) sched_yield();  // somebody else may need the core
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int size_;
  void* body_ = nullptr;
  Call call_ = nullptr;
  int64_t job_ = 0;            // the latest, or kClosed
  int64_t done_ = 0;           // pieces of it
  int64_t taken_[kMost] = {};  // by piece, the latest job for which it was taken
  // The leader's own records: pieces it did of those offered, nanoseconds it worked, those until all were done.
  int64_t own_ = 0, offered_ = 0;
  double worked_ = 0, together_ = 0, led_ = 0;
  bool is_alone_ = false;
};

}  // namespace nodeshape::NODESHAPE_TARGET
