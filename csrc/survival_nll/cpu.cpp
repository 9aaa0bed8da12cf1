// survival_nll and competing_risks_nll on the CPU: loss and gradient in one pass over the visits at
// risk.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/operators.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "survival_nll/arguments.h"
#include "survival_nll/outcomes.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

template <typename scalar_t>
std::tuple<Tensor, Tensor> run(const Settings& settings, const Tensor& hazards,
                               const Outcomes& outcomes, bool needs_grad) {
  using nll_t = accumulator_t<scalar_t>;
  using grad_t = saved_grad_t<scalar_t>;
  const bool reduces = settings.reduction != Reduction::kNone;
  const int64_t row_length = settings.slots * settings.classes;

  Tensor nll = empty(hazards, reduces ? std::vector<int64_t>{} : std::vector{settings.patients},
                     kDtypeOf<nll_t>);
  Tensor grad =
      empty(hazards, needs_grad ? shape_of(hazards) : std::vector<int64_t>{0}, kDtypeOf<grad_t>);
  const scalar_t* hazards_data = static_cast<const scalar_t*>(hazards.const_data_ptr());
  nll_t* nll_data = static_cast<nll_t*>(nll.mutable_data_ptr());
  grad_t* grad_data = needs_grad ? static_cast<grad_t*>(grad.mutable_data_ptr()) : nullptr;

  // Patients are summed in groups of fixed size, and the groups in their order: the same bits for
  // any number of threads.
  constexpr int64_t kGroup = Outcomes::kAtOnce;
  constexpr int64_t kWorthAThread = 32768;  // values
  const int64_t groups = (settings.patients + kGroup - 1) / kGroup;
  const int64_t grain =
      std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, kGroup * row_length));
  std::vector<double> group_nll(groups);
  std::atomic<bool> possible{true};

  parallel_for(0, groups, grain, [&](int64_t first_group, int64_t last_group) {
    const KeepDenormals denormals;
    Outcome group_outcomes[kGroup];
    double patient_nll[kGroup];
    for (int64_t group = first_group; group < last_group; ++group) {
      const int64_t begin = group * kGroup;
      const int64_t end = std::min(begin + kGroup, settings.patients);
      if (!outcomes.read(begin, end, group_outcomes)) {
        possible.store(false, std::memory_order_relaxed);
        return;
      }
      const int64_t offset = begin * row_length;
      // All zeros first, while the rows fit the cache: one fill of fixed size costs less than the
      // exact remainder of each row, whose length no branch predictor knows.
      if (grad_data) std::fill(grad_data + offset, grad_data + end * row_length, grad_t(0));
      rows_nll(settings,
               Rows<scalar_t>{hazards_data + offset, grad_data ? grad_data + offset : nullptr,
                              group_outcomes, end - begin},
               patient_nll);
      double sum = 0;
      for (int64_t i = 0; i < end - begin; ++i) {
        const double weighted = patient_nll[i] * group_outcomes[i].weight;
        if (!reduces) nll_data[begin + i] = static_cast<nll_t>(weighted);
        sum += weighted;
      }
      group_nll[group] = sum;
    }
  });
  if (!possible.load()) outcomes.refuse();

  if (reduces) {
    double total = 0;
    for (const double sum : group_nll) total += sum;
    *nll_data = static_cast<nll_t>(total * settings.share);
  }
  return {nll, grad};
}

std::tuple<Tensor, Tensor> nll_and_grad(Settings settings, const Tensor& hazards,
                                        const Outcomes& outcomes, bool needs_grad) {
  const bool is_mean = settings.reduction == Reduction::kMean;
  settings.share = is_mean ? 1.0 / static_cast<double>(settings.patients) : 1.0;
  check_row_length(settings.slots, settings.classes);
  const Tensor rows = torch::stable::contiguous(hazards);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(hazards.scalar_type(), "hazards", [&](auto tag) {
    result = run<typename decltype(tag)::type>(settings, rows, outcomes, needs_grad);
  });
  return result;
}

std::tuple<Tensor, Tensor> survival_nll(const Tensor& hazards, const Tensor& event_times,
                                        const Tensor& event_indicators,
                                        const OptionalTensor& sequence_mask,
                                        const OptionalTensor& entry_times,
                                        const OptionalTensor& sample_weight, int64_t link,
                                        bool censored_included, double eps, int64_t reduction,
                                        bool needs_grad) {
  if (hazards.dim() != 2) throw std::invalid_argument("hazards: expected shape [B, V]");
  check_options("survival_nll", false, link, eps, reduction);
  const int64_t patients = hazards.sizes()[0];
  const int64_t slots = hazards.sizes()[1];
  return nll_and_grad({patients, slots, 1, static_cast<Link>(link), censored_included, eps,
                       static_cast<Reduction>(reduction), 1.0},
                      hazards,
                      {patients, slots, 1, "event_indicators", event_times, event_indicators,
                       sequence_mask, entry_times, sample_weight},
                      needs_grad);
}

std::tuple<Tensor, Tensor> competing_risks_nll(const Tensor& hazards, const Tensor& event_times,
                                               const Tensor& event_types,
                                               const OptionalTensor& sequence_mask,
                                               const OptionalTensor& entry_times,
                                               const OptionalTensor& sample_weight, int64_t link,
                                               bool censored_included, double eps,
                                               int64_t reduction, bool needs_grad) {
  if (hazards.dim() != 3) throw std::invalid_argument("hazards: expected shape [B, V, K]");
  check_options("competing_risks_nll", true, link, eps, reduction);
  const int64_t patients = hazards.sizes()[0];
  const int64_t slots = hazards.sizes()[1];
  const int64_t classes = hazards.sizes()[2];
  const int64_t causes = causes_of(classes, link);
  return nll_and_grad({patients, slots, classes, static_cast<Link>(link), censored_included, eps,
                       static_cast<Reduction>(reduction), 1.0},
                      hazards,
                      {patients, slots, causes, "event_types", event_times, event_types,
                       sequence_mask, entry_times, sample_weight},
                      needs_grad);
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("survival_nll", EHRSEQ_BOX(&ehrseq::survival::survival_nll));
  m.impl("competing_risks_nll", EHRSEQ_BOX(&ehrseq::survival::competing_risks_nll));
}
