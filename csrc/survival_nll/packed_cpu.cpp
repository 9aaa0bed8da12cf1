// The survival losses of packed batches on the CPU. The visits of a patient are far apart in
// time-major rows, but those of patients of neighbouring ranks are side by side at every time. So
// patients are taken in the order of their ranks, some at a time. With softmax their visits are
// transposed into rows of the padded layout, given to its kernel, and their gradients transposed
// back.

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/groups.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/transposed_visits.h"
#include "common/tensors.h"
#include "survival_nll/arguments.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

// Patients by rank; see groups.h.
template <typename scalar_t>
class RankedPatients {
 public:
  using grad_t = saved_grad_t<scalar_t>;
  static constexpr int64_t kWorthAThread = 16384;

  // `grad` is null where none is needed; `values` is how many hazards there are.
  RankedPatients(const LossSettings& settings, const RankLayout& layout,
                 const std::vector<Outcome>& outcomes, const scalar_t* hazards, grad_t* grad,
                 int64_t values)
      : settings_(settings),
        layout_(layout),
        outcomes_(outcomes),
        hazards_(hazards),
        grad_(grad),
        values_(values) {}

  class Worker {
   public:
    explicit Worker(const RankedPatients& all)
        : all_(all), visits_(all.layout_, all.settings_.classes) {}

    bool nll(int64_t first, int64_t count, Outcome* outcomes, double* patient_nll) {
      for (int64_t i = 0; i < count; ++i) outcomes[i] = all_.outcomes_[all_.patient(first + i)];
      if (all_.settings_.link == Link::kSoftmax) {
        nll_of_transposed(first, count, outcomes, patient_nll);
      } else {
        const RankRows<scalar_t> rows{all_.hazards_,
                                      all_.grad_,
                                      all_.values_,
                                      all_.layout_.row_starts(),
                                      all_.layout_.most_visits(),
                                      first,
                                      outcomes,
                                      count};
        ranks_nll(all_.settings_, rows, patient_nll);
      }
      return true;
    }

   private:
    void nll_of_transposed(int64_t first, int64_t count, const Outcome* outcomes,
                           double* patient_nll) {
      int64_t slots = 0;  // what is after the last event time of these patients changes nothing
      for (int64_t i = 0; i < count; ++i) slots = std::max(slots, outcomes[i].time + 1);
      visits_.gather(all_.hazards_, first, count, slots);
      LossSettings settings = all_.settings_;
      settings.slots = visits_.slots();
      grad_t* grad = all_.grad_ ? visits_.zero_gradients() : nullptr;
      rows_nll(settings, Rows<scalar_t>{visits_.values(), grad, outcomes, count}, patient_nll);
      if (all_.grad_) visits_.scatter_gradients(all_.grad_);
    }

    const RankedPatients& all_;
    TransposedVisits<scalar_t> visits_;
  };

  Worker worker() const { return Worker(*this); }
  int64_t patient(int64_t rank) const { return layout_.patient_of_rank(rank); }
  int64_t values_per_group() const {
    constexpr int64_t kGroup = OutcomeReader::kAtOnce;
    const int64_t groups = (settings_.patients + kGroup - 1) / kGroup;
    return values_ / std::max<int64_t>(1, groups) + 1;
  }

 private:
  const LossSettings& settings_;
  const RankLayout& layout_;
  const std::vector<Outcome>& outcomes_;
  const scalar_t* hazards_;
  grad_t* grad_;
  int64_t values_;
};

std::tuple<Tensor, Tensor> packed_survival_nll(
    const Tensor& hazards, const Tensor& row_starts, const Tensor& unsorted_indices,
    const Tensor& last_rows, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, int64_t link,
    bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  constexpr auto kName = "packed_survival_nll";
  expect_on_cpu(kName, hazards, row_starts, unsorted_indices, last_rows, event_times, event_types,
                entry_times, sample_weight);
  expect_packed_hazards(kName, hazards);
  const bool competing = hazards.dim() == 2;
  expect_options(kName, competing, link, eps, reduction);
  const int64_t classes = competing ? hazards.size(1) : 1;
  const int64_t causes = causes_of(kName, classes, link);
  expect_row_numbers(kName, row_starts, unsorted_indices, last_rows);
  const RankLayout layout(kName, hazards.size(0), row_starts, unsorted_indices, last_rows);
  expect_row_length(kName, layout.most_visits(), classes);
  expect_outcomes(kName, layout.patients(), competing, event_times, event_types, entry_times,
                  sample_weight);
  const auto as_reduction = static_cast<Reduction>(reduction);
  const LossSettings settings{
      layout.patients(), 0,   classes,      static_cast<Link>(link),
      censored_included, eps, as_reduction, share_of_a_patient(as_reduction, layout.patients())};
  const OutcomeReader reader(layout.patients(), VisitMask(layout.lengths()), causes,
                             name_of_types(competing), event_times, event_types, entry_times,
                             sample_weight);
  const Tensor rows = torch::stable::contiguous(hazards);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const std::vector<Outcome> outcomes = read_all(reader, layout.patients());
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const RankedPatients<scalar_t> all(settings, layout, outcomes, data<const scalar_t>(rows),
                                       needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr,
                                       rows.numel());
    result = {nll_of_groups<scalar_t>(settings, rows, all), grad};
  });
  return result;
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_survival_nll", EHRSEQ_BOX(&ehrseq::survival::packed_survival_nll));
}
