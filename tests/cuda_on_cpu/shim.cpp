// Runs grids of CUDA threads on the host: one fiber per thread, blocks in turn.
//
// The order of blocks, warps and lanes is drawn anew for each launch (from a seed, so that a run
// can be repeated): a result that depends on it shows in any test that computes twice. Shared
// memory holds NaN when a block starts.
//
// The blocks of a cluster run together: one of them, in an order that is drawn again and again, as
// far as it gets without the others, then the next. A block that does not wait for its neighbours
// thus runs well ahead of them, or far behind. What a block finds in its own shared memory when it
// starts is NaN, whatever was written there before; and so is what others find when it has ended.

#include <cuda_runtime.h>
#include <fibers.h>
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
#include <unordered_map>
#include <unordered_set>
#include <vector>

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace cuda_on_cpu {

unsigned lane = 0;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 48 << 10;  // that no kernel has to ask for beforehand
constexpr size_t kMostAskedFor = 227 << 10;
constexpr unsigned kMostBlocks = 8;  // of a cluster, on every GPU that has them

Grid grid;
std::mutex one_at_a_time;
uint64_t seed = 1;
int64_t launches = 0;
int64_t memsets = 0;
bool capturing = false;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
std::unordered_set<const void*> loaded;             // kernels that have been launched
std::unordered_map<const void*, size_t> asked_for;  // shared memory, by kernel

Fiber& current() { return *grid.running; }

Fiber* lane_of_my_warp(unsigned lane) {
  const size_t first = current().block->first;
  const size_t index = static_cast<size_t>(&current() - grid.fibers.data()) - first;
  const size_t at = index - current().lane + lane;
  return at < grid.threads ? &grid.fibers[first + at] : nullptr;
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
  blockIdx = fiber.block->index;
  lane = fiber.lane;
#if CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&grid.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  Context::change(grid.scheduler, fiber.context);
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(grid.scheduler_fake_stack, nullptr, nullptr);
#endif
}

void release_barrier_if_all_are_there(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier != block.alive) return;
  block.at_barrier = 0;
  for (unsigned i = 0; i < grid.threads; ++i) {
    Fiber& fiber = grid.fibers[block.first + i];
    if (fiber.state != State::kAtBarrier) continue;
    fiber.state = State::kReady;
  }
}

void release_cluster_if_all_are_there() {
  if (grid.arrived == 0 || grid.arrived != grid.alive) return;
  grid.arrived = 0;
  ++grid.phase;
  for (unsigned i = 0; i < grid.threads * grid.blocks.size(); ++i) {
    Fiber& fiber = grid.fibers[i];
    if (fiber.state != State::kAtCluster) continue;
    fiber.state = State::kReady;
  }
}

void fiber_main() {
#if CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &grid.scheduler_stack, &grid.scheduler_stack_bytes);
#endif
  try {
    grid.body(grid.argument);
    if (current().has_arrived) fail("a thread arrived at the cluster's barrier and did not wait");
  } catch (const std::exception& error) {
    grid.failure = error.what();
  }
  Fiber& fiber = current();
  fiber.state = State::kDone;
  --grid.alive;
  --fiber.block->alive;
  release_barrier_if_all_are_there(*fiber.block);
  release_cluster_if_all_are_there();
  leave_fiber(fiber, true);
  std::abort();  // a finished fiber is never entered again
}

using Together = void (*)(void* const* of_lanes);

// The lanes of the mask meet; the last one to come computes for all.
uint64_t meet(Kind kind, unsigned mask, uint64_t value, unsigned source,
              Together together = nullptr) {
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

  if (kind == Kind::kTogether) {
    void* of_lanes[kWarp];
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane] == nullptr) fail("a product of a warp that lacks lanes");
      of_lanes[lane] = reinterpret_cast<void*>(lanes[lane]->value);
    }
    together(of_lanes);
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

void make_fibers(unsigned threads) {
  if (grid.fibers.empty()) grid.fibers.resize(kMostThreads * kMostBlocks);  // never moved
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

void poison_shared(const Block& block, bool poisoned) {
#if CUDA_ON_CPU_ASAN
  if (block.shared == nullptr) return;
  if (poisoned) {
    __asan_poison_memory_region(block.shared, grid.shared_bytes);
  } else {
    __asan_unpoison_memory_region(block.shared, grid.shared_bytes);
  }
#else
  (void)block, (void)poisoned;
#endif
}

// The static variables of the block that runs next take the place of the last one's.
void put_in_place(Block& block, const Range& statics) {
  if (grid.in_place != &block) {
    if (grid.in_place != nullptr && statics.bytes > 0) {
      grid.in_place->statics.assign(statics.begin, statics.begin + statics.bytes);
    }
    grid.in_place = &block;
    if (block.started && statics.bytes > 0) {
      std::memcpy(statics.begin, block.statics.data(), statics.bytes);
    }
  }
  if (block.started) return;
  block.started = true;
  if (statics.bytes > 0) std::memset(statics.begin, 0xff, statics.bytes);
  if (block.shared != nullptr) std::memset(block.shared, 0xff, grid.shared_bytes);
}

// The blocks of one cluster, from their first thread to their last.
void run_blocks(const Range& statics, std::mt19937_64& random) {
  for (Block& block : grid.blocks) {
    block.alive = grid.threads;
    block.at_barrier = 0;
    block.started = false;
    poison_shared(block, false);
    for (unsigned i = 0; i < grid.threads; ++i) {
      Fiber& fiber = grid.fibers[block.first + i];
      fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      fiber.block = &block;
      fiber.lane = i % kWarp;
      fiber.state = State::kReady;
      fiber.has_arrived = false;
      fiber.fake_stack = nullptr;
#if CUDA_ON_CPU_ASAN
      __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
      fiber.context.start_at(fiber_main, fiber.stack, kStackBytes);
    }
  }
  grid.alive = grid.threads * static_cast<unsigned>(grid.blocks.size());
  grid.arrived = 0;
  grid.in_place = nullptr;

  while (grid.alive > 0) {
    bool progress = false;
    std::shuffle(grid.block_order.begin(), grid.block_order.end(), random);
    for (const unsigned at : grid.block_order) {
      Block& block = grid.blocks[at];
      const bool had_threads = block.alive > 0;
      for (bool ran = true; ran;) {
        ran = false;
        for (const unsigned i : grid.order) {
          Fiber& fiber = grid.fibers[block.first + i];
          if (fiber.state != State::kReady) continue;
          progress = ran = true;
          put_in_place(block, statics);
          enter_fiber(fiber);
          if (!grid.failure.empty()) return;
        }
      }
      if (had_threads && block.alive == 0 && block.shared != nullptr) {
        std::memset(block.shared, 0xff, grid.shared_bytes);
        poison_shared(block, true);
      }
    }
    if (!progress) {
      grid.failure = "deadlock: some threads of block " + std::to_string(blockIdx.x) +
                     " wait for others that never come";
      return;
    }
  }
}

// Blocks of a cluster, along the first dimension; 0 for clusters that no GPU takes.
unsigned cluster_size(const cudaLaunchConfig_t& config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) return 0;
    const auto& dim = config.attrs[i].val.clusterDim;
    if (dim.y != 1 || dim.z != 1 || dim.x < 1 || dim.x > kMostBlocks) return 0;
    size = dim.x;
  }
  return config.gridDim.x % size == 0 ? size : 0;
}

size_t most_shared(const void* kernel) {
  const auto found = asked_for.find(kernel);
  return found == asked_for.end() ? kMostShared : found->second;
}

bool possible(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 g = config.gridDim;
  const dim3 b = config.blockDim;
  const auto threads = uint64_t{b.x} * b.y * b.z;
  return g.x > 0 && g.y > 0 && g.z > 0 && g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535 &&
         threads > 0 && threads <= kMostThreads && b.z <= 64 &&
         config.dynamicSmemBytes <= most_shared(kernel) && cluster_size(config) > 0;
}

}  // namespace

void* dynamic_shared() { return current().block->shared; }
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source) {
  return meet(Kind::kShuffle, mask, bits, source);
}
unsigned ballot(unsigned mask, bool vote) {
  return static_cast<unsigned>(meet(Kind::kBallot, mask, vote, 0));
}
void sync_warp(unsigned mask) { meet(Kind::kSync, mask, 0, 0); }
void trap() { fail("__trap()"); }
void meet_whole_warp(void* mine, Together together) {
  meet(Kind::kTogether, 0xffffffffu, reinterpret_cast<uint64_t>(mine), 0, together);
}

void sync_block() {
  Fiber& self = current();
  self.state = State::kAtBarrier;
  ++self.block->at_barrier;
  release_barrier_if_all_are_there(*self.block);
  if (self.state == State::kAtBarrier) leave_fiber(self, false);
}

unsigned cluster_rank() { return static_cast<unsigned>(current().block - grid.blocks.data()); }

void arrive_at_cluster() {
  Fiber& self = current();
  if (self.has_arrived) fail("a thread arrives twice at the cluster's barrier");
  self.has_arrived = true;
  self.phase = grid.phase;
  ++grid.arrived;
  release_cluster_if_all_are_there();
}

void wait_for_cluster() {
  Fiber& self = current();
  if (!self.has_arrived) fail("a thread waits at the cluster's barrier and has not arrived");
  if (self.phase == grid.phase) {
    self.state = State::kAtCluster;
    leave_fiber(self, false);
  }
  self.has_arrived = false;
}

void* map_shared_rank(const void* own, unsigned rank) {
  const char* at = static_cast<const char*>(own);
  const char* begin = current().block->shared;
  if (begin == nullptr || at < begin || at >= begin + grid.shared_bytes) {
    fail("what is mapped to another block is not in the dynamic shared memory of this one");
  }
  if (rank >= grid.blocks.size()) fail("a block outside the cluster is asked for its memory");
  const Block& other = grid.blocks[rank];
  if (other.started && other.alive == 0) fail("a block that has ended is asked for its memory");
  return other.shared + (at - begin);
}

void ask_for_shared(const void* kernel, size_t bytes) { asked_for[kernel] = bytes; }
size_t most_that_can_be_asked_for() { return kMostAskedFor; }

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                     void* argument) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++launches;
  if (!possible(config, kernel)) return cudaErrorInvalidConfiguration;
  if (loaded.insert(kernel).second && capturing && capture_mode != cudaStreamCaptureModeRelaxed) {
    return cudaErrorStreamCaptureUnsupported;
  }
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  grid.body = body;
  grid.argument = argument;
  grid.failure.clear();
  grid.threads = blockDim.x * blockDim.y * blockDim.z;
  grid.shared_bytes = config.dynamicSmemBytes;
  const unsigned together = cluster_size(config);
  make_fibers(grid.threads * together);
  grid.blocks.assign(together, Block{});
  grid.block_order.resize(together);
  std::iota(grid.block_order.begin(), grid.block_order.end(), 0u);
  for (unsigned rank = 0; rank < together; ++rank) {
    grid.blocks[rank].first = rank * grid.threads;
    if (grid.shared_bytes == 0) continue;
    const size_t whole = (grid.shared_bytes + 15) / 16 * 16;
    grid.blocks[rank].shared = static_cast<char*>(std::aligned_alloc(16, whole));
  }

  std::mt19937_64 random(seed++);
  draw_thread_order(random);
  std::vector<uint64_t> clusters(uint64_t{gridDim.x} * gridDim.y * gridDim.z / together);
  std::iota(clusters.begin(), clusters.end(), uint64_t{0});
  std::shuffle(clusters.begin(), clusters.end(), random);
  const Range statics = static_shared();
  for (const uint64_t cluster : clusters) {
    for (unsigned rank = 0; rank < together; ++rank) {
      const uint64_t block = cluster * together + rank;
      grid.blocks[rank].index = {static_cast<unsigned>(block % gridDim.x),
                                 static_cast<unsigned>(block / gridDim.x % gridDim.y),
                                 static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    }
    run_blocks(statics, random);
    if (!grid.failure.empty()) break;
  }
  for (const Block& block : grid.blocks) {
    poison_shared(block, false);
    std::free(block.shared);
  }
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
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
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
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, cuda_on_cpu::capture_mode);
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
  if (capturing) cuda_on_cpu::loaded.clear();  // as in a new process
}
}
