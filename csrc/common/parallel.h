// Threads through the stable ABI. An exception cannot leave a torch worker thread with its type, so
// the first one (by position, not by time: the message must not depend on the schedule) is kept and
// thrown again on the calling thread.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>

// Where threads come from. The tests' build for the thread sanitizer names another namespace, whose
// threads the sanitizer can follow: it knows nothing of OpenMP's.
#ifdef EHRSEQ_THREADS
#include EHRSEQ_THREADS_HEADER
#else
#define EHRSEQ_THREADS torch::stable
#endif

namespace ehrseq {

inline int64_t num_threads() { return EHRSEQ_THREADS::get_num_threads(); }

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::exception_ptr first_error;
  int64_t first_error_at = std::numeric_limits<int64_t>::max();
  std::mutex guard;
  auto kept = [&](int64_t from, int64_t to) {
    try {
      body(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (from < first_error_at) {
        first_error_at = from;
        first_error = std::current_exception();
      }
    }
  };
  EHRSEQ_THREADS::parallel_for(begin, end, grain, kept);
  if (first_error) std::rethrow_exception(first_error);
}

// body(from, to, share) over shares of [0, count), at most one per thread.
template <typename Body>
void share_out(int64_t count, int64_t threads, const Body& body) {
  const int64_t shares = std::min(threads, count);
  if (shares <= 1) {
    if (count > 0) body(int64_t{0}, count, int64_t{0});
    return;
  }
  parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    body(count * first / shares, count * last / shares, first);
  });
}

}  // namespace ehrseq
