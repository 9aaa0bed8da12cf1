// In what order a layer's visits are gone through, and by how many threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/recurrent/layer.h"
#include "common/recurrent/team.h"

namespace ehrseq::recurrent {

// Threads, and from which time on they share each step.
struct Plan {
  int64_t threads;
  int64_t shared_from;
};

template <typename Cell, typename S>
Plan plan_for(const Shape& shape, const std::vector<Step>& steps) {
  // Below about this many multiplications waking a thread costs more than it saves: some 20 us. Of
  // threads that come late it has to be more, as those that share a step wait for one another.
  const int64_t worth_a_thread = threads_come_late() ? int64_t{1} << 26 : int64_t{1} << 20;
  const int64_t work = shape.visits * Cell::kGates * shape.hidden * (shape.hidden + shape.inputs);
  const int64_t most = std::max<int64_t>(1, work / worth_a_thread);
  const int64_t threads = std::min(num_threads(), most);
  const int64_t few = Cell::template kernels<S>().tile_rows * threads;
  int64_t time = static_cast<int64_t>(steps.size());
  while (time > 0 && steps[time - 1].patients < few) --time;
  return {threads, time};
}

inline int64_t first_row_of(const Shape& shape, const std::vector<Step>& steps, int64_t time) {
  return time < static_cast<int64_t>(steps.size()) ? steps[time].first_row : shape.visits;
}

// A scan of some times, in its order. Before plan.shared_from each thread scans some of the
// patients; from then on all threads share every step.
template <typename ByPatients, typename InStep>
void scan(const std::vector<Step>& steps, Times times, const Plan& plan, int64_t blocks,
          bool falling, const ByPatients& by_patients, const InStep& in_step) {
  const int64_t split = std::clamp(plan.shared_from, times.first, times.last);
  const auto head = [&] {
    if (times.first == split) return;
    const Times early{times.first, split};
    const auto bounds = groups_of_equal_work(steps, early, plan.threads);
    const int64_t groups = static_cast<int64_t>(bounds.size()) - 1;
    share_out(groups, plan.threads, [&](int64_t first, int64_t last, int64_t) {
      for (int64_t group = first; group < last; ++group) {
        by_patients(early, bounds[group], bounds[group + 1]);
      }
    });
  };
  const auto tail = [&] {
    const int64_t count = times.last - split;
    const int64_t shares = std::min({plan.threads, blocks, kMostShares});
    if (count == 0) return;
    run_in_step(count, shares, [&](int64_t step, int64_t share) {
      const int64_t time = falling ? times.last - 1 - step : split + step;
      in_step(time, blocks * share / shares, blocks * (share + 1) / shares);
    });
  };
  if (falling) {
    tail();
    head();
  } else {
    head();
    tail();
  }
}

// The gradients of the sums of one chunk of the backward pass (and as much for its gates, where
// they are computed again): a share of a common last-level cache. Sums over visits are cut where
// chunks are, so that this is part of the numbers.
constexpr int64_t kChunkBytes = int64_t{4} << 20;

// The chunks of the backward pass, in its order: consecutive times, as many as fit `rows`, one at
// least.
inline std::vector<Times> chunks_of(const std::vector<Step>& steps, int64_t rows, bool reverse) {
  std::vector<Times> chunks;
  const int64_t count = static_cast<int64_t>(steps.size());
  int64_t first = 0;
  int64_t filled = 0;
  for (int64_t time = 0; time < count; ++time) {
    if (time > first && filled + steps[time].patients > rows) {
      chunks.push_back({first, time});
      first = time;
      filled = 0;
    }
    filled += steps[time].patients;
  }
  chunks.push_back({first, count});
  if (!reverse) std::reverse(chunks.begin(), chunks.end());
  return chunks;
}

}  // namespace ehrseq::recurrent
