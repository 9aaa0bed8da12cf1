// The one loop of the survival losses on the CPU: patients in groups of fixed size, whatever their
// layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/options.h"
#include "common/parallel.h"
#include "common/survival/outcomes.h"
#include "common/survival/saved_grad.h"
#include "common/tensors.h"

namespace ehrseq::survival {

// The loss of all patients, and the gradient with respect to hazards where one is needed.
//
// `settings` have `patients`, `reduction` and `share` (share_of_a_patient). A layout has
//   worker()                      what a thread keeps from group to group; it has
//     .nll(first, count, outcomes, patient_nll)  the outcomes, losses and gradients of `count`
//                                 patients from number `first` on; false if an outcome is
//                                 impossible
//   patient(number)               which of the caller's patients has that number
//   values_per_group()            how much work a group is
//   kWorthAThread                 how many values are worth a thread
//   grad                          where its workers write gradients; null where none is needed
//
// Groups are summed in their order: the same bits for any number of threads.
template <typename scalar_t, typename Settings, typename Layout>
Tensor nll_of_groups(const Settings& settings, const Tensor& hazards, const Layout& layout) {
  using nll_t = accumulator_t<scalar_t>;
  constexpr int64_t kGroup = OutcomeReader::kAtOnce;
  const bool reduces = settings.reduction != Reduction::kNone;
  Tensor nll = allocated(hazards, reduces ? std::vector<int64_t>{} : std::vector{settings.patients},
                         kDtypeOf<nll_t>);
  nll_t* nll_data = static_cast<nll_t*>(nll.mutable_data_ptr());
  const int64_t groups = (settings.patients + kGroup - 1) / kGroup;
  const int64_t grain = std::max<int64_t>(1, Layout::kWorthAThread / layout.values_per_group());
  std::vector<double> group_nll(groups);

  parallel_for(0, groups, grain, [&](int64_t first_group, int64_t last_group) {
    const KeepDenormals denormals;
    auto worker = layout.worker();
    Outcome outcomes[kGroup];
    double patient_nll[kGroup];
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t first = group * kGroup;
      const int64_t count = std::min(kGroup, settings.patients - first);
      if (!worker.nll(first, count, outcomes, patient_nll)) return;
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double weighted = patient_nll[i] * outcomes[i].weight;
        if (!reduces) nll_data[layout.patient(first + i)] = static_cast<nll_t>(weighted);
        sum += weighted;
      }
      group_nll[group] = sum;
    }
  });

  if (reduces) {
    double total = 0;
    for (const double sum : group_nll) total += sum;
    *nll_data = static_cast<nll_t>(total * settings.share);
  }
  return nll;
}

// Where the gradient of the hazards is saved; empty where none is needed.
template <typename scalar_t>
Tensor empty_gradient(const Tensor& hazards, bool needs_grad) {
  return allocated(hazards, needs_grad ? shape_of(hazards) : std::vector<int64_t>{0},
                   kDtypeOf<saved_grad_t<scalar_t>>);
}

inline double share_of_a_patient(Reduction reduction, int64_t patients) {
  return reduction == Reduction::kMean ? 1.0 / static_cast<double>(patients) : 1.0;
}

}  // namespace ehrseq::survival
