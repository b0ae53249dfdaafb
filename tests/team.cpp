// Teams of one to four threads whose pieces read what other pieces wrote; tests/test_team.py builds it with
// ThreadSanitizer.
#include "../csrc/cpu/team.h"

#include <cstdio>
#include <thread>
#include <vector>

using namespace nodeshape;
using namespace nodeshape::NODESHAPE_TARGET;

int main() {
  constexpr int kNumbers = 64, kJobs = 200;
  const Executor executor{4, [](int64_t tasks, void (*task)(int64_t, void*), void* context) {
                            std::vector<std::thread> threads;
                            for (int64_t i = 0; i < tasks; ++i) threads.emplace_back(task, i, context);
                            for (std::thread& thread : threads) thread.join();
                          }};
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
