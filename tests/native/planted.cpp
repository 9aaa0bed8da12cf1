// Faults for the sanitizers to find (tests/test_sanitized.py): a sanitized run that does not find
// these shows nothing. Built with the flags and the headers of the kernels.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "common/recurrent/team.h"

namespace {

// Each share of a step reads what its neighbour wrote one step before, as the LSTM's tail does. A
// correct team keeps in step; `torn` does the same without waiting.
int64_t in_step(bool torn) {
  constexpr int64_t kSteps = 200;
  constexpr int64_t kShares = 4;
  std::vector<int64_t> rows((kSteps + 1) * kShares, 1);
  const auto work = [&](int64_t step, int64_t share) {
    const int64_t* before = rows.data() + step * kShares;
    rows[(step + 1) * kShares + share] = before[(share + 1) % kShares] % 7 + before[share];
  };
  if (torn) {
    ehrseq::parallel_for(0, kShares, 1, [&](int64_t first, int64_t last) {
      for (int64_t step = 0; step < kSteps; ++step)
        for (int64_t share = first; share < last; ++share) work(step, share);
    });
  } else {
    ehrseq::recurrent::run_in_step(kSteps, kShares, work);
  }
  int64_t sum = 0;
  for (int64_t share = 0; share < kShares; ++share) sum += rows[kSteps * kShares + share];
  return sum;
}

}  // namespace

#define PLANTED extern "C" __attribute__((visibility("default"))) int64_t

PLANTED planted_overflow(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i <= count; ++i) sum += values[i];
  return static_cast<int64_t>(sum);
}

PLANTED planted_overflow_of_integers(int32_t count) { return count + 1; }

PLANTED planted_race() {
  int64_t counter = 0;
  ehrseq::parallel_for(0, 1000, 1, [&](int64_t first, int64_t last) { counter += last - first; });
  return counter;
}

PLANTED planted_race_out_of_step() { return in_step(true); }

PLANTED correct_in_step() { return in_step(false); }
