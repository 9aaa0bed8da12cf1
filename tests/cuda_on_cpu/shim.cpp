// Runs grids of CUDA threads on the host: one fiber per thread, blocks in turn.
//
// The order of blocks, warps and lanes is drawn anew for each launch (from a seed, so that a run
// can be repeated): a result that depends on it shows in any test that computes twice. Shared
// memory holds NaN when a block starts.

#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ASAN 1
#else
#define CUDA_ON_CPU_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace cuda_on_cpu {

unsigned lane = 0;

namespace {

constexpr size_t kStackBytes = CUDA_ON_CPU_ASAN ? 512 << 10 : 128 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 48 << 10;  // that no kernel has to ask for beforehand

// --- switching stacks ------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the registers that a callee must keep; swapcontext would make a system call as well.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

struct Context {
  void* pointer = nullptr;

  void start_at(void (*entry)(), char* stack, size_t bytes) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;                              // where a return address would stand
    *--top = reinterpret_cast<void*>(entry);       // popped by ret
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // and the saved registers before it
    pointer = top;
  }
  static void change(Context& from, Context& to) { cuda_on_cpu_switch(&from.pointer, to.pointer); }
};
#else
struct Context {
  ucontext_t context;

  void start_at(void (*entry)(), char* stack, size_t bytes) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// --- threads, warps, blocks ------------------------------------------------------------------

enum class State { kReady, kAtBarrier, kInWarp, kDone };
enum class Kind { kShuffle, kBallot, kSync };

struct Fiber {
  uint3 thread;
  unsigned lane;
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::kDone;
  // the collective that it waits in
  Kind kind;
  unsigned mask;
  unsigned source;
  uint64_t value;
  uint64_t result;
};

struct Grid {
  void (*body)(void*);
  void* argument;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  std::vector<unsigned> order;
  unsigned threads = 0;
  unsigned alive = 0;
  unsigned at_barrier = 0;
  char* shared = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string failure;
};

Grid grid;
std::mutex one_at_a_time;
uint64_t seed = 1;
int64_t launches = 0;
int64_t memsets = 0;
bool capturing = false;

Fiber& current() { return *grid.running; }

Fiber* lane_of_my_warp(unsigned lane) {
  const size_t index = static_cast<size_t>(&current() - grid.fibers.data());
  const size_t at = index - current().lane + lane;
  return at < grid.threads ? &grid.fibers[at] : nullptr;
}

[[noreturn]] void fail(const std::string& what) {
  const uint3 at = current().thread;
  throw std::runtime_error(what + " (block " + std::to_string(blockIdx.x) + ", " +
                           std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) +
                           "; thread " + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
                           std::to_string(at.z) + ")");
}

void leave_fiber(Fiber& fiber, bool for_good) {
#if CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, grid.scheduler_stack,
                                 grid.scheduler_stack_bytes);
#else
  (void)for_good;
#endif
  Context::change(fiber.context, grid.scheduler);
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &grid.scheduler_stack,
                                  &grid.scheduler_stack_bytes);
#endif
}

void enter_fiber(Fiber& fiber) {
  grid.running = &fiber;
  threadIdx = fiber.thread;
  lane = fiber.lane;
#if CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&grid.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  Context::change(grid.scheduler, fiber.context);
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(grid.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void release_barrier_if_all_are_there() {
  if (grid.at_barrier == 0 || grid.at_barrier != grid.alive) return;
  grid.at_barrier = 0;
  for (unsigned i = 0; i < grid.threads; ++i) {
    Fiber& fiber = grid.fibers[i];
    if (fiber.state != State::kAtBarrier) continue;
    fiber.state = State::kReady;
  }
}

void fiber_main() {
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &grid.scheduler_stack, &grid.scheduler_stack_bytes);
#endif
  try {
    grid.body(grid.argument);
  } catch (const std::exception& error) {
    grid.failure = error.what();
  }
  Fiber& fiber = current();
  fiber.state = State::kDone;
  --grid.alive;
  release_barrier_if_all_are_there();
  leave_fiber(fiber, true);
  std::abort();  // a finished fiber is never entered again
}

// The lanes of the mask meet; the last one to come computes for all.
uint64_t meet(Kind kind, unsigned mask, uint64_t value, unsigned source) {
  Fiber& self = current();
  if (((mask >> self.lane) & 1) == 0) fail("a lane is not in the mask of its collective");
  self.kind = kind;
  self.mask = mask;
  self.source = source;
  self.value = value;

  Fiber* lanes[kWarp] = {};
  bool complete = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (((mask >> lane) & 1) == 0) continue;
    Fiber* fiber = lane_of_my_warp(lane);
    // the last warp of a block may be short: its missing lanes may be named
    if (fiber == nullptr) continue;
    lanes[lane] = fiber;
    if (fiber == &self) continue;
    if (fiber->state == State::kDone) fail("a collective waits for a lane that has returned");
    if (fiber->state != State::kInWarp) {
      complete = false;
    } else if (fiber->mask != mask || fiber->kind != kind) {
      fail("lanes of one mask are in different collectives");
    }
  }
  if (!complete) {
    self.state = State::kInWarp;
    leave_fiber(self, false);
    return self.result;
  }

  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (lanes[lane] != nullptr && lanes[lane]->value != 0) votes |= 1u << lane;
  }
  for (Fiber* fiber : lanes) {
    if (fiber == nullptr) continue;
    if (kind == Kind::kShuffle) {
      if (fiber->source >= kWarp || lanes[fiber->source] == nullptr) {
        fail("a shuffle reads a lane that is not in its mask");
      }
      fiber->result = lanes[fiber->source]->value;
    } else {
      fiber->result = votes;
    }
    fiber->state = State::kReady;
  }
  return self.result;
}

// --- memory ----------------------------------------------------------------------------------

// The static __shared__ variables: this library's thread-local storage, of this thread.
thread_local char thread_local_anchor;

struct Range {
  char* begin = nullptr;
  size_t bytes = 0;
};

Range static_shared() {
  thread_local_anchor = 0;  // makes sure that it is there
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        const auto code = reinterpret_cast<uintptr_t>(&fiber_main);
        bool ours = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD) ours |= begin <= code && code < begin + header.p_memsz;
          if (header.p_type == PT_TLS) bytes = header.p_memsz;
        }
        if (!ours) return 0;
        *static_cast<Range*>(data) = {static_cast<char*>(info->dlpi_tls_data), bytes};
        return 1;
      },
      &range);
  return range.begin == nullptr ? Range{} : range;
}

char* new_stack() {
  void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<char*>(memory) + kGuardBytes;
}

void make_fibers(unsigned threads) {
  if (grid.fibers.empty()) grid.fibers.resize(kMostThreads);  // never moved
  for (unsigned i = 0; i < threads; ++i) {
    if (grid.fibers[i].stack == nullptr) grid.fibers[i].stack = new_stack();
  }
}

// Warps in a random order, lanes in a random order within each.
void draw_thread_order(std::mt19937_64& random) {
  std::vector<unsigned> warps((grid.threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0u);
  std::shuffle(warps.begin(), warps.end(), random);
  grid.order.clear();
  for (const unsigned warp : warps) {
    const size_t begin = grid.order.size();
    for (unsigned i = warp * kWarp; i < std::min((warp + 1) * kWarp, grid.threads); ++i) {
      grid.order.push_back(i);
    }
    std::shuffle(grid.order.begin() + static_cast<std::ptrdiff_t>(begin), grid.order.end(), random);
  }
}

void run_block() {
  for (unsigned i = 0; i < grid.threads; ++i) {
    Fiber& fiber = grid.fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.lane = i % kWarp;
    fiber.state = State::kReady;
    fiber.fake_stack = nullptr;
#if CUDA_ON_CPU_ASAN
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
    fiber.context.start_at(fiber_main, fiber.stack, kStackBytes);
  }
  grid.alive = grid.threads;
  grid.at_barrier = 0;

  while (grid.alive > 0) {
    bool progress = false;
    for (const unsigned i : grid.order) {
      if (grid.fibers[i].state != State::kReady) continue;
      progress = true;
      enter_fiber(grid.fibers[i]);
      if (!grid.failure.empty()) return;
    }
    if (!progress) {
      grid.failure = "deadlock: some threads of block " + std::to_string(blockIdx.x) +
                     " wait for others that never come";
      return;
    }
  }
}

bool possible(const cudaLaunchConfig_t& config) {
  const dim3 g = config.gridDim;
  const dim3 b = config.blockDim;
  const auto threads = uint64_t{b.x} * b.y * b.z;
  return g.x > 0 && g.y > 0 && g.z > 0 && g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535 &&
         threads > 0 && threads <= kMostThreads && b.z <= 64 &&
         config.dynamicSmemBytes <= kMostShared;
}

}  // namespace

void* dynamic_shared() { return grid.shared; }
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source) {
  return meet(Kind::kShuffle, mask, bits, source);
}
unsigned ballot(unsigned mask, bool vote) {
  return static_cast<unsigned>(meet(Kind::kBallot, mask, vote, 0));
}
void sync_warp(unsigned mask) { meet(Kind::kSync, mask, 0, 0); }
void trap() { fail("__trap()"); }

void sync_block() {
  Fiber& self = current();
  self.state = State::kAtBarrier;
  ++grid.at_barrier;
  release_barrier_if_all_are_there();
  if (self.state == State::kAtBarrier) leave_fiber(self, false);
}

cudaError_t run_grid(const cudaLaunchConfig_t& config, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++launches;
  if (!possible(config)) return cudaErrorInvalidConfiguration;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  grid.body = body;
  grid.argument = argument;
  grid.failure.clear();
  grid.threads = blockDim.x * blockDim.y * blockDim.z;
  make_fibers(grid.threads);
  grid.shared =
      config.dynamicSmemBytes == 0
          ? nullptr
          : static_cast<char*>(std::aligned_alloc(16, (config.dynamicSmemBytes + 15) / 16 * 16));

  std::mt19937_64 random(seed++);
  draw_thread_order(random);
  std::vector<uint64_t> blocks(uint64_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  std::shuffle(blocks.begin(), blocks.end(), random);
  const Range shared = static_shared();
  for (const uint64_t block : blocks) {
    if (shared.bytes > 0) std::memset(shared.begin, 0xff, shared.bytes);
    if (grid.shared) std::memset(grid.shared, 0xff, config.dynamicSmemBytes);
    blockIdx = {static_cast<unsigned>(block % gridDim.x),
                static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    run_block();
    if (!grid.failure.empty()) break;
  }
  std::free(grid.shared);
  if (grid.failure.empty()) return cudaSuccess;
  std::fprintf(stderr, "cuda_on_cpu: %s\n", grid.failure.c_str());
  return cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return cuda_on_cpu::grid.failure.c_str();
    default:
      return "invalid argument";
  }
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  ++cuda_on_cpu::memsets;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_on_cpu::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// What a CUDA build of torch would give: the host has one device and one stream.
extern "C" {
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// For tests, through ctypes.
__attribute__((visibility("default"))) void cuda_on_cpu_reset_counts() {
  cuda_on_cpu::launches = cuda_on_cpu::memsets = 0;
}
__attribute__((visibility("default"))) int64_t cuda_on_cpu_launches() {
  return cuda_on_cpu::launches;
}
__attribute__((visibility("default"))) int64_t cuda_on_cpu_memsets() {
  return cuda_on_cpu::memsets;
}
__attribute__((visibility("default"))) void cuda_on_cpu_set_seed(uint64_t seed) {
  cuda_on_cpu::seed = seed;
}
__attribute__((visibility("default"))) void cuda_on_cpu_set_capturing(bool capturing) {
  cuda_on_cpu::capturing = capturing;
}
}
