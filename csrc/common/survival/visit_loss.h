// The one loop of the losses whose terms are visits, on the CPU: their weights where the mean needs
// the sum of them, then terms and gradients.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/options.h"
#include "common/parallel.h"
#include "common/survival/visit_blocks.h"
#include "common/tensors.h"

namespace ehrseq::survival {

// The sum of one number per patient, patients in the caller's order. `make_worker()` gives what a
// thread keeps; its group(first, count, sums) sets the numbers of patients first..first + count, at
// most kGroupPatients, as the layout counts them. False from it is an impossible input, after which
// the sum means nothing and *possible is false.
template <typename Layout, typename MakeWorker>
double sum_of_patients(const Layout& layout, int64_t values, const MakeWorker& make_worker,
                       bool* possible) {
  constexpr int64_t kWorthAThread = 16384;  // values
  const int64_t groups = (layout.patients() + kGroupPatients - 1) / kGroupPatients;
  const int64_t group_values = values / std::max<int64_t>(1, groups) + 1;
  std::vector<double> sums(layout.patients());
  std::atomic<bool> all_possible{true};
  parallel_for(0, groups, std::max<int64_t>(1, kWorthAThread / group_values),
               [&](int64_t first_group, int64_t last_group) {
                 const KeepDenormals denormals;
                 auto worker = make_worker();
                 double of_group[kGroupPatients];
                 for (int64_t group = first_group; group < last_group; ++group) {
                   const int64_t first = group * kGroupPatients;
                   const int64_t count = std::min(kGroupPatients, layout.patients() - first);
                   if (!worker.group(first, count, of_group)) {
                     all_possible.store(false, std::memory_order_relaxed);
                     return;
                   }
                   for (int64_t i = 0; i < count; ++i)
                     sums[layout.patient(first + i)] = of_group[i];
                 }
               });
  *possible = all_possible.load();
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// A worker of sum_of_patients that takes visits by blocks: `Blocks` has block(block, values), which
// sets a number for each visit and is false where one is impossible, and padding(row, count).
template <typename Layout, typename Blocks>
class SumByBlocks {
 public:
  SumByBlocks(const Layout& layout, Blocks blocks) : layout_(layout), blocks_(std::move(blocks)) {}

  bool group(int64_t first, int64_t count, double* sums) {
    VisitSums of_group(first);
    double values[kBlockRows];
    bool possible = true;
    const auto block = [&](const Block& rows) {
      possible = possible && blocks_.block(rows, values);
      if (possible) of_group.add(rows, values);
    };
    const auto padding = [&](int64_t row, int64_t rows) { blocks_.padding(row, rows); };
    const bool well_formed = layout_.for_each_block(first, count, block, padding);
    for (int64_t i = 0; i < count; ++i) sums[i] = of_group.of(i);
    return possible && well_formed;
  }

 private:
  const Layout& layout_;
  Blocks blocks_;
};

template <typename Layout, typename MakeBlocks>
double sum_of_visits(const Layout& layout, int64_t values_per_row, const MakeBlocks& make_blocks,
                     bool* possible) {
  using Blocks = decltype(make_blocks());
  const auto make_worker = [&] { return SumByBlocks<Layout, Blocks>(layout, make_blocks()); };
  return sum_of_patients(layout, layout.rows() * values_per_row, make_worker, possible);
}

}  // namespace ehrseq::survival
