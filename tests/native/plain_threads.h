// Threads that the thread sanitizer can follow, in place of torch's, whose OpenMP it knows nothing
// of. The same shares as at::parallel_for: at most one per thread, none smaller than the grain.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace ehrseq_plain_threads {

inline int64_t get_num_threads() { return torch::stable::get_num_threads(); }

inline bool& inside() {
  static thread_local bool value = false;
  return value;
}

// A thread that waits for work, over and over: starting one for every loop is what the sanitizer's
// own bookkeeping does not survive. Only the caller and this thread meet at its mutex, so that no
// two shares of a loop are put in an order that hides a race between them.
class Worker {
 public:
  Worker() {
    std::thread([this] { serve(); }).detach();
  }

  void start(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_ = std::move(work);
    changed_.notify_all();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return work_ == nullptr; });
  }

 private:
  void serve() {
    inside() = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return work_ != nullptr; });
      const std::function<void()> work = work_;
      lock.unlock();
      work();
      lock.lock();
      work_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> work_;
};

constexpr int64_t kMostThreads = 16;

// Left behind at exit, as threads may be waiting in them.
inline Worker* workers() {
  static Worker* const all = new Worker[kMostThreads];
  return all;
}

inline std::mutex& one_loop_at_a_time() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t most = std::min(grain > 0 ? (count + grain - 1) / grain : count, kMostThreads);
  const int64_t threads = inside() ? 1 : std::min<int64_t>(get_num_threads(), most);
  if (threads <= 1) {
    body(begin, end);
    return;
  }
  const std::lock_guard<std::mutex> lock(one_loop_at_a_time());
  const int64_t share = (count + threads - 1) / threads;
  int64_t started = 0;
  for (int64_t from = begin + share; from < end; from += share) {
    workers()[started++].start(
        [&body, from, share, end] { body(from, std::min(from + share, end)); });
  }
  inside() = true;
  body(begin, std::min(begin + share, end));
  inside() = false;
  for (int64_t at = 0; at < started; ++at) workers()[at].wait();
}

}  // namespace ehrseq_plain_threads
