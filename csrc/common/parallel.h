// Loops over threads. An exception cannot leave a thread of torch's with its type, so the first one
// (by position, not by time: the message must not depend on the schedule) is kept and thrown again
// on the calling thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>

namespace ehrseq {

// As many as torch.set_num_threads says.
int64_t num_threads();

// Whether threads were late to come a moment ago, as they are beside busy processes: then work of
// less than a time slice, in which threads wait for one another, is better left to the caller.
bool threads_come_late();

// Calls run(context, share) once for every share of [0, shares), on at most so many threads, the
// caller's among them. No call may wait for one that has not begun: one thread may have to make
// them all.
void run_shares(int64_t shares, void (*run)(void* context, int64_t share), void* context);

// A loop is divided among threads only so far that each has about this much to do: below, waking
// one costs more than it saves, and beside a busy process it may come milliseconds late.
constexpr int64_t kBytesWorthAThread = int64_t{256} << 10;

// How many of `count` items that move `bytes` in all are worth a thread.
inline int64_t grain_of_bytes(int64_t count, int64_t bytes) {
  const int64_t shares = std::max<int64_t>(1, bytes / kBytesWorthAThread);
  return std::max<int64_t>(1, (count + shares - 1) / shares);
}

// body(from, to) over [begin, end), in at most as many parts as there are threads, none of them
// shorter than `grain` but the last.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t least = std::max<int64_t>(1, grain);
  const int64_t most = std::min(num_threads(), (count + least - 1) / least);
  if (most <= 1) return body(begin, end);

  struct Loop {
    const Body& body;
    int64_t begin;
    int64_t end;
    int64_t part;
    std::mutex guard;
    std::exception_ptr first_error;
    int64_t first_error_at = std::numeric_limits<int64_t>::max();

    void run(int64_t share) {
      const int64_t from = begin + share * part;
      try {
        body(from, std::min(from + part, end));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (from < first_error_at) {
          first_error_at = from;
          first_error = std::current_exception();
        }
      }
    }
  } loop{body, begin, end, (count + most - 1) / most, {}, {}};
  run_shares((count + loop.part - 1) / loop.part,
             [](void* context, int64_t share) { static_cast<Loop*>(context)->run(share); }, &loop);
  if (loop.first_error) std::rethrow_exception(loop.first_error);
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
    for (int64_t share = first; share < last; ++share) {
      body(count * share / shares, count * (share + 1) / shares, share);
    }
  });
}

}  // namespace ehrseq
