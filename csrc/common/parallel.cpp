// Which threads run a loop.
//
// Torch's own (OpenMP's), while they turn up at once: PyTorch's operations leave them spinning for
// the next loop, and a second set of threads would have to compete with them for the cores. But a
// loop of OpenMP's ends only when every one of its threads has come, with work left for it or not:
// beside a busy process each loop, however small, then takes until the scheduler gets round to the
// last of them, milliseconds. So where torch's threads have come late, loops go for a while to
// threads of this library, which sleep when there is nothing to do, and which the caller does not
// wait for: what they have not begun it does itself.
//
// In a forked child OpenMP's threads are gone and GNU's OpenMP waits for them for ever, while those
// here are started anew.

#include "common/parallel.h"

#include <pthread.h>
#include <signal.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <list>
#include <memory>
#include <system_error>
#include <thread>

#include "common/denormals.h"

// Where threads come from. The tests' build for the thread sanitizer names another namespace, whose
// threads the sanitizer can follow: it knows nothing of OpenMP's.
#ifdef EHRSEQ_THREADS
#include EHRSEQ_THREADS_HEADER
#else
#define EHRSEQ_THREADS torch::stable
#endif

namespace ehrseq {
namespace {

using Nanoseconds = int64_t;

Nanoseconds now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// ---------------------------------------------------------------------------------------------
// Threads that nobody waits for

class Loop {
 public:
  Loop(int64_t shares, void (*run)(void*, int64_t), void* context)
      : shares_(shares), run_(run), context_(context), claimed_(new std::atomic<bool>[shares]) {
    for (int64_t share = 0; share < shares; ++share) claimed_[share] = false;
  }

  // All shares that no other thread has begun, from `first` on: a thread has the same one in every
  // loop, as far as it comes in time, so that its memory is in its cache.
  void work(int64_t first) {
    const FloatingMode::Scope scope(mode_);
    for (int64_t i = 0; i < shares_; ++i) {
      const int64_t share = (first + i) % shares_;
      if (!claimed_[share].exchange(true, std::memory_order_relaxed)) run_(context_, share);
    }
  }

  // The helpers' mutex guards these.
  int64_t wanted = 0;  // helpers that may still join
  int64_t inside = 0;
  std::condition_variable left;

 private:
  const int64_t shares_;
  void (*const run_)(void*, int64_t);
  void* const context_;
  const std::unique_ptr<std::atomic<bool>[]> claimed_;
  const FloatingMode mode_;
};

class Helpers {
 public:
  void run(Loop& loop, int64_t threads) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < threads - 1 && start()) ++started_;
      loop.wanted = std::min(threads - 1, started_);
      loops_.push_back(&loop);
    }
    for (int64_t i = 1; i < threads; ++i) begun_.notify_one();
    loop.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    loops_.remove(&loop);
    loop.left.wait(lock, [&] { return loop.inside == 0; });
  }

 private:
  // False where the system has no thread left.
  bool start() {
    // Signals are the business of the program's threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool is_started = true;
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      is_started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return is_started;
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Loop* loop = nullptr;
      begun_.wait(lock, [&] { return (loop = next()) != nullptr; });
      const int64_t first = loop->wanted--;
      ++loop->inside;
      lock.unlock();
      loop->work(first);
      lock.lock();
      if (--loop->inside == 0) loop->left.notify_one();
    }
  }

  Loop* next() const {
    for (Loop* loop : loops_) {
      if (loop->wanted > 0) return loop;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable begun_;
  std::list<Loop*> loops_;
  int64_t started_ = 0;
};

// Left behind at exit, as threads may be waiting in it, and in a forked child, where they are gone.
std::atomic<Helpers*> helpers{new Helpers};
std::atomic<bool> is_forked{false};

const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
  helpers = new Helpers;
  is_forked = true;
});

// ---------------------------------------------------------------------------------------------
// Whether torch's threads turn up

// Late is what no idle core takes to wake a thread; less than one time slice of the scheduler.
constexpr Nanoseconds kLate = 1'000'000;
constexpr Nanoseconds kShortestHold = 50'000'000;
constexpr Nanoseconds kLongestHold = 2'000'000'000;

// After torch's threads came late, loops go to the helpers for a while; the longer, the sooner they
// are late again after that.
class Lateness {
 public:
  bool is_on(Nanoseconds time) const { return time < until_.load(std::memory_order_relaxed); }

  void found(Nanoseconds time) {
    const Nanoseconds hold = hold_.load(std::memory_order_relaxed);
    const bool again = time - until_.load(std::memory_order_relaxed) < 4 * hold;
    const Nanoseconds next = again ? std::min(2 * hold, kLongestHold) : kShortestHold;
    hold_.store(next, std::memory_order_relaxed);
    until_.store(time + next, std::memory_order_relaxed);
  }

 private:
  std::atomic<Nanoseconds> until_{0};
  std::atomic<Nanoseconds> hold_{kShortestHold};
};

Lateness lateness;

// The largest team that was asked for: threads are started for it, which takes its time.
std::atomic<int64_t> largest_team{1};
// As many threads as OpenMP last granted; OMP_THREAD_LIMIT and OMP_DYNAMIC hold for helpers too.
std::atomic<int64_t> granted{std::numeric_limits<int64_t>::max()};

void raise(std::atomic<int64_t>& most, int64_t value) {
  int64_t before = most.load(std::memory_order_relaxed);
  while (before < value && !most.compare_exchange_weak(before, value, std::memory_order_relaxed)) {
  }
}

void run_by_torch(int64_t shares, void (*run)(void*, int64_t), void* context) {
  const FloatingMode mode;
  const auto caller = std::this_thread::get_id();
  const Nanoseconds begun = now();
  std::atomic<int64_t> last_arrival{begun};
  std::atomic<int64_t> team{0};
  Nanoseconds own_end = begun;
  EHRSEQ_THREADS::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    raise(last_arrival, now());
    team.fetch_add(1, std::memory_order_relaxed);
    const FloatingMode::Scope scope(mode);
    for (int64_t share = first; share < last; ++share) run(context, share);
    if (std::this_thread::get_id() == caller) own_end = now();
  });
  const Nanoseconds end = now();
  const int64_t came = team.load(std::memory_order_relaxed);
  granted.store(came < shares ? came : std::numeric_limits<int64_t>::max(),
                std::memory_order_relaxed);
  const bool is_new = largest_team.load(std::memory_order_relaxed) < shares;
  raise(largest_team, shares);
  if (is_new) return;
  const Nanoseconds waited = end - own_end;
  const bool were_late = last_arrival.load(std::memory_order_relaxed) - begun > kLate ||
                         (waited > kLate && waited > 2 * (own_end - begun));
  if (were_late) lateness.found(end);
}

// For tests.
enum class Team { kAny, kTorch, kHelpers, kLate };
std::atomic<Team> asked_team{Team::kAny};
std::atomic<int64_t> most_shares{1};

}  // namespace

bool threads_come_late() {
  const Team asked = asked_team.load(std::memory_order_relaxed);
  return asked == Team::kLate || (asked == Team::kAny && lateness.is_on(now()));
}

int64_t num_threads() { return EHRSEQ_THREADS::get_num_threads(); }

void run_shares(int64_t shares, void (*run)(void* context, int64_t share), void* context) {
  raise(most_shares, shares);
  if (shares == 1) return run(context, 0);
  const bool by_helpers = is_forked.load(std::memory_order_relaxed) || threads_come_late() ||
                          asked_team.load(std::memory_order_relaxed) == Team::kHelpers;
  if (!by_helpers) return run_by_torch(shares, run, context);
  Loop loop(shares, run, context);
  helpers.load()->run(loop, std::min(shares, granted.load(std::memory_order_relaxed)));
}

}  // namespace ehrseq

// For tests: whose threads run loops (0: as above, 1: torch's, 2: the helpers, 3: as where torch's
// come late), and how many shares the most divided loop since the last call had.
extern "C" __attribute__((visibility("default"))) void ehrseq_fast_choose_team(int team) {
  ehrseq::asked_team = static_cast<ehrseq::Team>(team);
}
extern "C" __attribute__((visibility("default"))) int64_t ehrseq_fast_most_shares() {
  return ehrseq::most_shares.exchange(1);
}
