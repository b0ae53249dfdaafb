// Whether sharing a solve out to threads pays while others use the machine.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace nodeshape {

/// Whether solves are to use one thread for now. Threads that share their cores with somebody else may take longer than
/// one: such a loss is followed by 30 times as long with one thread, so that it costs no more than 3%.
class Company {
 public:
  static bool is_bad() { return now() < until(); }
  static void forget() { until() = 0; }

  static void judge(double together, double alone) {
    constexpr double kRest = 30;
    if (together > 1.02 * alone) until() = now() + int64_t(kRest * (together - alone));
  }

 private:
  static int64_t now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }
  static std::atomic<int64_t>& until() {
    static std::atomic<int64_t> time = 0;
    return time;
  }
};

}  // namespace nodeshape
