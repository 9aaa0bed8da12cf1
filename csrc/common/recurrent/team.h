// How the threads share a scan.
//
// While many patients have a visit, each thread computes all visits of some patients, and no thread
// waits. At the last times, which only few long records reach, every thread would read all the
// weights for a patient or two; there the threads divide the hidden units of each step instead, and
// wait for one another after it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "common/parallel.h"
#include "common/recurrent/layer.h"

namespace ehrseq::recurrent {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Runs work(step, share) for all shares of one step, then for all of the next, and so on. A thread
// has a share of its own, whose weights stay in its cache. It takes another's only where that one
// does not turn up; so a thread that comes late, or never, costs time but no progress, and there is
// no barrier that could wait for ever.
template <typename Work>
void run_in_step(int64_t steps, int64_t shares, const Work& work) {
  struct alignas(64) Progress {
    std::atomic<uint64_t> claimed{0};
    std::atomic<int64_t> done{0};
  };
  // How long a thread waits for another to begin its share, before it takes it; shorter where that
  // one has not come to the step before either.
  constexpr int64_t kPatience = 2000;
  constexpr int64_t kLittlePatience = 50;
  const std::unique_ptr<Progress[]> progress(new Progress[steps]);

  const auto claim_and_run = [&](int64_t step, int64_t share) {
    const uint64_t bit = uint64_t{1} << share;
    Progress& now = progress[step];
    if (now.claimed.load(std::memory_order_relaxed) & bit) return false;
    if (now.claimed.fetch_or(bit, std::memory_order_relaxed) & bit) return false;
    work(step, share);
    now.done.fetch_add(1, std::memory_order_release);
    return true;
  };
  const auto is_done = [&](int64_t step) {
    return progress[step].done.load(std::memory_order_acquire) == shares;
  };

  share_out(shares, shares, [&](int64_t own_first, int64_t own_last, int64_t) {
    int64_t patience = kPatience;
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t share = own_first; share < own_last; ++share) claim_and_run(step, share);
      for (int64_t waited = 0; waited < patience && !is_done(step); ++waited) pause();
      patience = kPatience;
      for (int64_t share = 0; share < shares && !is_done(step); ++share) {
        if (claim_and_run(step, share)) patience = kLittlePatience;
      }
      while (!is_done(step)) std::this_thread::yield();
    }
  });
}

constexpr int64_t kMostShares = 64;  // bits of Progress::claimed

// Cuts the patients of some times into groups of about equal work: the bounds of the groups. A
// group is consecutive patients, so that its rows at any time are consecutive too.
inline std::vector<int64_t> groups_of_equal_work(const std::vector<Step>& steps, Times times,
                                                 int64_t groups) {
  // A step costs something however few patients a group has left in it.
  constexpr int64_t kStepCost = 1;
  const int64_t patients = steps[times.first].patients;
  std::vector<int64_t> visits(patients);
  int64_t total = 0;
  int64_t p = 0;
  for (int64_t time = times.last; time-- > times.first;) {
    for (; p < steps[time].patients; ++p) {
      visits[p] = time + 1 - times.first;
      total += visits[p];
    }
  }
  const auto cut = [&](int64_t limit) {
    std::vector<int64_t> bounds{0};
    int64_t work = limit;
    for (p = 0; p < patients; ++p) {
      if (p > 0 && work + visits[p] > limit) bounds.push_back(p);
      if (p == bounds.back()) work = kStepCost * visits[p];
      work += visits[p];
    }
    bounds.push_back(patients);
    return bounds;
  };
  int64_t too_low = total / groups;
  int64_t enough = total + (kStepCost + 1) * visits[0];
  while (enough - too_low > 1) {
    const int64_t limit = (too_low + enough) / 2;
    (static_cast<int64_t>(cut(limit).size()) - 1 <= groups ? enough : too_low) = limit;
  }
  return cut(enough);
}

}  // namespace ehrseq::recurrent
