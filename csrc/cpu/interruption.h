// Ctrl-C during a long solve: the process's own handler of the signal runs as ever, and the time loops end early.
#pragma once

#include <csignal>
#include <cstdint>
#include <mutex>
#include <stdexcept>

namespace nodeshape {

/// Whether the solves that run now are to end, whatever they have so far; what every step of a time loop looks at.
extern int interruption;

/// While there is one, a signal that somebody handles ends solves, if they may end: they then throw, and who called
/// them sees what the handler has left to be seen. Short solves let a signal wait.
class Interruptible {
 public:
  /// `work`: elements of states that the solve goes through.
  explicit Interruptible(double work) {
    const std::lock_guard<std::mutex> lock(mutex());
    ++solves();
    if (!may_end() || work < kLong || installed()) return;
    installed() = true;
    for (int k = 0; k < kSignals; ++k) {
      struct sigaction ours = {};
      sigaction(kSignal[k], nullptr, &before(k));
      is_ours(k) =
          (before(k).sa_flags & SA_SIGINFO) == 0 && before(k).sa_handler != SIG_DFL && before(k).sa_handler != SIG_IGN;
      if (!is_ours(k)) continue;
      ours = before(k);
      ours.sa_handler = [](int signal) {
        __atomic_store_n(&interruption, 1, __ATOMIC_RELAXED);
        for (int k = 0; k < kSignals; ++k)
          if (kSignal[k] == signal) before(k).sa_handler(signal);
      };
      sigaction(kSignal[k], &ours, nullptr);
    }
  }
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
  ~Interruptible() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (--solves() > 0) return;
    for (int k = 0; installed() && k < kSignals; ++k)
      if (is_ours(k)) sigaction(kSignal[k], &before(k), nullptr);
    installed() = false;
    __atomic_store_n(&interruption, 0, __ATOMIC_RELAXED);
  }

  /// Whether callers know what to do about it; no others' solves end.
  static bool& may_end() {
    static bool whether = false;
    return whether;
  }

  /// To be called when the time loops have ended.
  void check() const {
    if (__atomic_load_n(&interruption, __ATOMIC_RELAXED) != 0)
      throw std::runtime_error("Interrupted: a signal ended the solve");
  }

 private:
  static constexpr double kLong = 1e6;
  static constexpr int kSignal[] = {SIGINT, SIGTERM, SIGHUP};
  static constexpr int kSignals = 3;

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static int64_t& solves() {
    static int64_t count = 0;
    return count;
  }
  static bool& installed() {
    static bool whether = false;
    return whether;
  }
  static bool& is_ours(int k) {
    static bool which[kSignals];
    return which[k];
  }
  static struct sigaction& before(int k) {
    static struct sigaction handlers[kSignals];
    return handlers[k];
  }
};

}  // namespace nodeshape
