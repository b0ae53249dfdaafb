// The fibres that play a block's threads.
#include "cuda_runtime.h"

#include <cstdio>
#include <cstdlib>
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

dim3 gridDim, blockDim, blockIdx, threadIdx;

/// Any kernel's dynamic shared memory; launches poison what they did not ask for.
constexpr size_t kSharedBytes = 1 << 18;
alignas(16) double nodeshape_shared_memory[kSharedBytes / sizeof(double)];

namespace cuda_shim {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 1 << 18;

/// A number from NODESHAPE_ISA, or `otherwise`.
long setting(const std::string& name, long otherwise) {
  const char* given = std::getenv("NODESHAPE_ISA");
  const std::string text = given == nullptr ? "" : given;
  const size_t at = text.find(name + "=");
  return at == std::string::npos ? otherwise : std::atol(text.c_str() + at + name.size() + 1);
}

// ---- switching fibres ----------------------------------------------------------------------------------------------

struct Fibre {
  void* stack_pointer;
  char* stack;
  enum { ready, at_barrier, at_exchange, done } state;
  uint64_t word;  // offered to the other lanes
};

#if defined(__x86_64__)
/// Save the registers that a call keeps on this stack, leave its pointer in *from, and go on with the stack `to`.
extern "C" void cuda_shim_switch(void** from, void* to);
asm(R"(
.text
.type cuda_shim_switch, @function
cuda_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the shim knows how to switch stacks on x86-64 only"
#endif

struct Block {
  std::vector<Fibre> fibres;
  std::vector<int> ready;          // in the order they will run, last first
  int running = -1;                // the fibre, or -1 for the launching thread
  int waiting = 0;                 // at the barrier
  std::vector<int> lanes_waiting;  // of each warp, at an exchange
  int left = 0;                    // fibres not done
  const std::function<void()>* kernel = nullptr;
  void* launcher = nullptr;  // its stack pointer
  std::minstd_rand random;
} block;

[[noreturn]] void abort_with(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s\n", message);
  std::abort();
}

void switch_to(int next) {
  const int previous = block.running;
  void** from = previous < 0 ? &block.launcher : &block.fibres[previous].stack_pointer;
  block.running = next;
  if (next >= 0) threadIdx.x = unsigned(next);
  cuda_shim_switch(from, next < 0 ? block.launcher : block.fibres[next].stack_pointer);
}

/// Go on with another fibre, the running one having to wait or being done.
void yield() {
  if (block.ready.empty()) {
    if (block.left > 0) abort_with("some threads wait at a barrier that others never reach");
    return switch_to(-1);
  }
  const int next = block.ready.back();
  block.ready.pop_back();
  if (next == block.running) return;
  switch_to(next);
}

void make_ready(int first, int count) {
  for (int i = first; i < first + count; ++i)
    if (block.fibres[i].state != Fibre::done) {
      block.fibres[i].state = Fibre::ready;
      block.ready.push_back(i);
      // Fisher-Yates as the list grows: any fibre may be next.
      std::swap(block.ready.back(), block.ready[block.random() % block.ready.size()]);
    }
}

void open_barrier_if_all_wait() {
  if (block.waiting == 0 || block.waiting < block.left) return;
  block.waiting = 0;
  make_ready(0, int(block.fibres.size()));
}

void fibre_main() {
  (*block.kernel)();
  block.fibres[block.running].state = Fibre::done;
  --block.left;
  open_barrier_if_all_wait();
  yield();
  abort_with("a finished thread was run again");
}

void prepare(Fibre& fibre) {
  if (fibre.stack == nullptr) fibre.stack = static_cast<char*>(std::aligned_alloc(64, kStackBytes));
  __asan_unpoison_memory_region(fibre.stack, kStackBytes);
  // As if cuda_shim_switch had been called by fibre_main's caller, which does not exist.
  void** top = reinterpret_cast<void**>(fibre.stack + kStackBytes) - 3;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fibre_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fibre.stack_pointer = top;
  fibre.state = Fibre::ready;
}

}  // namespace

int shared_limit() { return int(std::min<long>(setting("shared", kSharedBytes), kSharedBytes)); }

uint64_t exchange(uint64_t word, int lane_mask) {
  const int self = block.running, warp = self / kWarp;
  Fibre& fibre = block.fibres[self];
  fibre.word = word;
  fibre.state = Fibre::at_exchange;
  // Twice: no lane may offer its next word before all have read this one.
  uint64_t read = 0;
  for (int round = 0; round < 2; ++round) {
    if (++block.lanes_waiting[warp] == kWarp) {
      block.lanes_waiting[warp] = 0;
      make_ready(warp * kWarp, kWarp);
    }
    yield();
    if (round == 0) read = block.fibres[self ^ lane_mask].word;
  }
  return read;
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  if (const long seed = setting("seed", 0)) block.random.seed(unsigned(seed));
  const int threads = int(setting("threads", long(config.blockDim.x)));
  gridDim = config.gridDim;
  blockDim = dim3(unsigned(threads));
  if (int(block.fibres.size()) != threads) {
    for (size_t i = threads; i < block.fibres.size(); ++i) std::free(block.fibres[i].stack);
    block.fibres.resize(threads, Fibre{});
    block.lanes_waiting.assign((threads + kWarp - 1) / kWarp, 0);
  }
  block.kernel = &kernel;
  char* shared = reinterpret_cast<char*>(nodeshape_shared_memory);
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx = dim3(b);
    __asan_unpoison_memory_region(shared, kSharedBytes);
    std::memset(shared, 0xff, config.dynamicSmemBytes);
    __asan_poison_memory_region(shared + config.dynamicSmemBytes, kSharedBytes - config.dynamicSmemBytes);
    block.left = threads;
    block.waiting = 0;
    for (Fibre& fibre : block.fibres) prepare(fibre);
    make_ready(0, threads);
    yield();
  }
}

}  // namespace cuda_shim

void __syncthreads() {
  using namespace cuda_shim;
  block.fibres[block.running].state = Fibre::at_barrier;
  ++block.waiting;
  open_barrier_if_all_wait();
  yield();
}
