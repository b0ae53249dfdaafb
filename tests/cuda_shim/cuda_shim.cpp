// The fibres that play the threads of blocks that run together.
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

/// Dynamic shared memory of the block that runs; launches poison what they did not ask for.
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
  int waiting = 0;           // at the barrier
  int left = 0;              // fibres not done
  std::vector<char> shared;  // its shared memory while another block runs
};

struct Team {
  std::vector<Fibre> fibres;  // of one block after another
  std::vector<Block> blocks;
  int threads = 0;                 // of a block
  std::vector<int> ready;          // in the order they will run, last first
  int running = -1;                // the fibre, or -1 for the launching thread
  std::vector<int> lanes_waiting;  // of each warp, at an exchange
  int left = 0;                    // fibres not done
  int slept = 0;                   // times in a row that a fibre went to sleep and no barrier opened
  const std::function<void()>* kernel = nullptr;
  void* launcher = nullptr;  // its stack pointer
  std::minstd_rand random;

  int block_of(int fibre) const { return fibre / threads; }
  Block& block() { return blocks[block_of(running)]; }
} team;

[[noreturn]] void abort_with(const char* message) {
  std::fprintf(stderr, "cuda_shim: %s\n", message);
  std::abort();
}

/// Let the block `next` find its own shared memory.
void change_block(unsigned next) {
  if (next == blockIdx.y) return;
  char* shared = reinterpret_cast<char*>(nodeshape_shared_memory);
  std::vector<char>&from = team.blocks[blockIdx.y].shared, &to = team.blocks[next].shared;
  std::memcpy(from.data(), shared, from.size());
  std::memcpy(shared, to.data(), to.size());
  blockIdx.y = next;
}

void switch_to(int next) {
  const int previous = team.running;
  void** from = previous < 0 ? &team.launcher : &team.fibres[previous].stack_pointer;
  team.running = next;
  if (next >= 0) {
    threadIdx.x = unsigned(next % team.threads);
    change_block(unsigned(team.block_of(next)));
  }
  cuda_shim_switch(from, next < 0 ? team.launcher : team.fibres[next].stack_pointer);
}

/// Go on with another fibre, the running one having to wait or being done.
void yield() {
  if (team.ready.empty()) {
    if (team.left > 0) abort_with("some threads wait at a barrier that others never reach");
    return switch_to(-1);
  }
  const int next = team.ready.back();
  team.ready.pop_back();
  if (next == team.running) return;
  switch_to(next);
}

void make_ready(int first, int count) {
  for (int i = first; i < first + count; ++i)
    if (team.fibres[i].state != Fibre::done) {
      team.fibres[i].state = Fibre::ready;
      team.ready.push_back(i);
      // Fisher-Yates as the list grows: any fibre may be next.
      std::swap(team.ready.back(), team.ready[team.random() % team.ready.size()]);
    }
}

/// Of the running fibre's block.
void open_barrier_if_all_wait() {
  Block& block = team.block();
  if (block.waiting == 0 || block.waiting < block.left) return;
  block.waiting = 0;
  team.slept = 0;
  make_ready(team.block_of(team.running) * team.threads, team.threads);
}

void fibre_main() {
  (*team.kernel)();
  team.fibres[team.running].state = Fibre::done;
  --team.left;
  --team.block().left;
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

int thread_limit() { return int(setting("threads", 1024)); }

uint64_t exchange(uint64_t word, int lane_mask) {
  const int self = team.running, warp = self / kWarp;
  Fibre& fibre = team.fibres[self];
  fibre.word = word;
  fibre.state = Fibre::at_exchange;
  // Twice: no lane may offer its next word before all have read this one.
  uint64_t read = 0;
  for (int round = 0; round < 2; ++round) {
    if (++team.lanes_waiting[warp] == kWarp) {
      team.lanes_waiting[warp] = 0;
      make_ready(warp * kWarp, kWarp);
    }
    yield();
    if (round == 0) read = team.fibres[self ^ lane_mask].word;
  }
  return read;
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  if (const long seed = setting("seed", 0)) team.random.seed(unsigned(seed));
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  team.threads = int(blockDim.x);
  const int fibres = team.threads * int(gridDim.y);
  for (size_t i = fibres; i < team.fibres.size(); ++i) std::free(team.fibres[i].stack);
  team.fibres.resize(fibres, Fibre{});
  team.lanes_waiting.assign((fibres + kWarp - 1) / kWarp, 0);
  team.kernel = &kernel;
  char* shared = reinterpret_cast<char*>(nodeshape_shared_memory);
  for (unsigned x = 0; x < gridDim.x; ++x) {
    blockIdx = dim3(x, 0);
    __asan_unpoison_memory_region(shared, kSharedBytes);
    std::memset(shared, 0xff, config.dynamicSmemBytes);
    __asan_poison_memory_region(shared + config.dynamicSmemBytes, kSharedBytes - config.dynamicSmemBytes);
    team.blocks.assign(gridDim.y, Block{0, team.threads, std::vector<char>(config.dynamicSmemBytes, char(0xff))});
    team.left = fibres;
    team.slept = 0;
    for (Fibre& fibre : team.fibres) prepare(fibre);
    make_ready(0, fibres);
    yield();
  }
}

}  // namespace cuda_shim

void __syncthreads() {
  using namespace cuda_shim;
  team.fibres[team.running].state = Fibre::at_barrier;
  ++team.block().waiting;
  open_barrier_if_all_wait();
  yield();
}

void __nanosleep(unsigned) {
  using namespace cuda_shim;
  constexpr int kPatience = 1 << 20;
  if (++team.slept > kPatience) abort_with("some threads wait for a block that never arrives");
  make_ready(team.running, 1);
  yield();
}
