// What the host's stand-in for a GPU consists of: fibers and their stacks, blocks, and where the
// static __shared__ variables are.
#pragma once

#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>

#include <new>
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

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = CUDA_ON_CPU_ASAN ? 512 << 10 : 128 << 10;
constexpr size_t kGuardBytes = 4096;

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

enum class State { kReady, kAtBarrier, kAtCluster, kInWarp, kDone };
enum class Kind { kShuffle, kBallot, kSync, kTogether };

// One of those that run together; alone, where the grid has no clusters.
struct Block {
  uint3 index{};
  unsigned first = 0;  // of its fibers
  unsigned alive = 0;
  unsigned at_barrier = 0;
  bool started = false;
  char* shared = nullptr;
  std::vector<char> statics;  // its static __shared__ variables, while another block runs
};

struct Fiber {
  uint3 thread;
  Block* block = nullptr;
  // at the cluster's barrier: not waited for yet, and in which of its phases
  bool has_arrived = false;
  uint64_t phase = 0;
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
  unsigned threads = 0;  // of a block
  std::vector<Block> blocks;
  std::vector<unsigned> block_order;
  Block* in_place = nullptr;  // whose static variables are where kernels look for them
  unsigned alive = 0;         // of all blocks
  unsigned arrived = 0;
  uint64_t phase = 0;
  size_t shared_bytes = 0;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::string failure;
};

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
        const auto code = reinterpret_cast<uintptr_t>(&static_shared);
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

}  // namespace
}  // namespace cuda_on_cpu
