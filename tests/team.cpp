// Teams of one to four threads whose pieces read what other pieces wrote; tests/test_team.py builds it with
// ThreadSanitizer.
#include "../csrc/cpu/team.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

using namespace nodeshape;
using namespace nodeshape::NODESHAPE_TARGET;

/// How many threads do a job of which no piece ends before all have begun. One that is never begun ends the others.
int threads_at_work(Team& team) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  std::atomic<int> begun = 0;
  std::mutex mutex;
  std::set<std::thread::id> threads;
  team.run([&](int) {
    ++begun;
    while (begun < team.size() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  return int(threads.size());
}

int main() {
  constexpr int kNumbers = 64, kJobs = 200;
  const Executor executor{4, [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
                            std::vector<std::thread> threads;
                            for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, i, context);
                            for (std::thread& thread : threads) thread.join();
                          }};
  for (int size = 1; size <= 4; ++size)
    Team::gather(executor, size, [&](Team& team) { std::printf("%d of %d threads\n", threads_at_work(team), size); });

  int wrong = 0;
  for (int round = 0; round < 50; ++round)
    for (int size = 1; size <= 4; ++size)
      Team::gather(executor, size, [&](Team& team) {
        int a[kNumbers] = {}, b[kNumbers] = {};
        const auto raise = [&](const int* from, int* to) {
          team.run([&](int piece) {
            for (int i = piece * kNumbers / team.size(); i < (piece + 1) * kNumbers / team.size(); ++i)
              to[i] = from[kNumbers - 1 - i] + 1;
          });
        };
        for (int job = 0; job < kJobs; ++job) {
          raise(b, a);
          raise(a, b);
        }
        for (int x : b) wrong += x != 2 * kJobs;
      });
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
