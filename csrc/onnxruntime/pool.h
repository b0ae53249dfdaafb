// The intra-op threads of a session as those that share a solve's work.
#pragma once

#include <onnxruntime_c_api.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "../cpu/company.h"
#include "../problem.h"

namespace nodeshape {

/// Throws what onnxruntime says has failed.
inline void check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw std::runtime_error(message);
}

class Pool {
 public:
  explicit Pool(const OrtApi& api) : api_(api) {}

  /// To be used by the thread that runs the kernel, for as long as `context` lives.
  Executor executor(const OrtKernelContext* context) {
    here() = {&api_, context};
    std::call_once(counted_, [&] { threads_ = count(); });
    return {threads_ > 1 && Company::is_bad() ? 1 : threads_, run, Company::judge};
  }

 private:
  /// What run() needs, of the thread that runs a kernel.
  struct Here {
    const OrtApi* api;
    const OrtKernelContext* context;
  };
  static Here& here() {
    static thread_local Here one;
    return one;
  }

  static void for_each(int64_t tasks, void (*task)(void*, size_t), void* argument) {
    const Here& at = here();
    check(*at.api, at.api->KernelContext_ParallelFor(at.context, task, size_t(tasks), size_t(tasks), argument));
  }

  /// onnxruntime's threads must not see what a task throws.
  static void run(int64_t tasks, void (*task)(int64_t, void*), void* context) {
    struct Work {
      void (*task)(int64_t, void*);
      void* context;
      std::once_flag failed;
      std::exception_ptr error;
    } work{task, context, {}, nullptr};
    for_each(
        tasks,
        [](void* argument, size_t i) {
          Work& work = *static_cast<Work*>(argument);
          try {
            work.task(int64_t(i), work.context);
          } catch (...) {
            std::call_once(work.failed, [&] { work.error = std::current_exception(); });
          }
        },
        &work);
    if (work.error) std::rethrow_exception(work.error);
  }

  /// How many threads there are, which onnxruntime does not say: as many as come to a meeting, up to the cores.
  static int64_t count() {
    using Clock = std::chrono::steady_clock;
    struct Meeting {
      int64_t most;
      Clock::time_point end;
      std::atomic<int64_t> present = 0;
      std::atomic<bool> over = false;
    } meeting{int64_t(std::thread::hardware_concurrency()), Clock::now() + std::chrono::milliseconds(5)};
    if (meeting.most <= 1) return 1;
    for_each(
        meeting.most,
        [](void* argument, size_t) {
          Meeting& meeting = *static_cast<Meeting*>(argument);
          if (meeting.over) return;
          ++meeting.present;
          while (!meeting.over && meeting.present < meeting.most && Clock::now() < meeting.end) sched_yield();
          meeting.over = true;
        },
        &meeting);
    return meeting.present;
  }

  const OrtApi& api_;
  std::once_flag counted_;
  int64_t threads_ = 1;
};

}  // namespace nodeshape
