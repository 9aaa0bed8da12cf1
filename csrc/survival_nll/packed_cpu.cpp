// The survival losses of packed batches on the CPU. The visits of a patient stand far apart in
// time-major rows, but those of patients of neighbouring ranks stand side by side at every time. So
// patients are taken in the order of their ranks, some at a time. With softmax their visits are
// turned into rows of the padded layout, given to its kernel, and their gradients turned back.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/operators.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "survival_nll/arguments.h"
#include "survival_nll/outcomes.h"
#include "survival_nll/packed_layout.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

// The visits of some neighbouring ranks as rows of the padded layout, `slots` per patient.
template <typename scalar_t>
class Turned {
 public:
  using grad_t = saved_grad_t<scalar_t>;

  Turned(const PackedLayout& layout, int64_t classes) : layout_(layout), classes_(classes) {}

  // Up to the last event time of these patients; what is not at risk changes nothing.
  void gather(const scalar_t* hazards, int64_t first, const Outcome* outcomes, int64_t patients) {
    first_ = first;
    patients_ = patients;
    slots_ = 0;
    for (int64_t i = 0; i < patients; ++i) slots_ = std::max(slots_, outcomes[i].time + 1);
    values_.resize(patients * slots_ * classes_);
    for (int64_t visit = 0; visit < slots_; ++visit) {
      const scalar_t* from = hazards + layout_.row(first, visit) * classes_;
      turn(patients_at(visit), from, classes_, values_.data() + visit * classes_,
           slots_ * classes_);
    }
  }

  grad_t* zero_gradients() {
    grads_.assign(values_.size(), grad_t(0));
    return grads_.data();
  }

  // Every visit of these patients is written: zeros after the last event time.
  void scatter_gradients(grad_t* grad) const {
    for (int64_t visit = 0; visit < slots_; ++visit) {
      grad_t* to = grad + layout_.row(first_, visit) * classes_;
      turn(patients_at(visit), grads_.data() + visit * classes_, slots_ * classes_, to, classes_);
    }
    for (int64_t visit = slots_; visit < layout_.most_visits(); ++visit) {
      const int64_t patients = patients_at(visit);
      if (patients == 0) return;  // nor is there one at any later time
      std::fill_n(grad + layout_.row(first_, visit) * classes_, patients * classes_, grad_t(0));
    }
  }

  const scalar_t* values() const { return values_.data(); }
  int64_t slots() const { return slots_; }

 private:
  // One visit of each patient, `classes` values, from one stride between patients to another.
  template <typename T>
  void turn(int64_t patients, const T* from, int64_t from_stride, T* to, int64_t to_stride) const {
    if (classes_ == 1) {  // a copy of known size is one instruction
      for (int64_t i = 0; i < patients; ++i) to[i * to_stride] = from[i * from_stride];
    } else {
      for (int64_t i = 0; i < patients; ++i) {
        std::copy_n(from + i * from_stride, classes_, to + i * to_stride);
      }
    }
  }

  int64_t patients_at(int64_t visit) const {
    return std::clamp<int64_t>(layout_.ranks_at(visit) - first_, 0, patients_);
  }

  const PackedLayout& layout_;
  int64_t classes_;
  int64_t first_ = 0;
  int64_t patients_ = 0;
  int64_t slots_ = 0;
  std::vector<scalar_t> values_;
  std::vector<grad_t> grads_;
};

std::vector<Outcome> read_all(const Outcomes& outcomes, int64_t patients) {
  std::vector<Outcome> all(patients);
  for (int64_t first = 0; first < patients; first += Outcomes::kAtOnce) {
    const int64_t last = std::min(first + Outcomes::kAtOnce, patients);
    if (!outcomes.read(first, last, all.data() + first)) outcomes.refuse();
  }
  return all;
}

template <typename scalar_t>
std::tuple<Tensor, Tensor> run(const Settings& settings, const PackedLayout& layout,
                               const Tensor& hazards, const Outcomes& outcomes, bool needs_grad) {
  using nll_t = accumulator_t<scalar_t>;
  using grad_t = saved_grad_t<scalar_t>;
  const bool reduces = settings.reduction != Reduction::kNone;
  Tensor nll = empty(hazards, reduces ? std::vector<int64_t>{} : std::vector{settings.patients},
                     kDtypeOf<nll_t>);
  Tensor grad =
      empty(hazards, needs_grad ? shape_of(hazards) : std::vector<int64_t>{0}, kDtypeOf<grad_t>);
  auto* nll_data = static_cast<nll_t*>(nll.data_ptr());
  auto* grad_data = static_cast<grad_t*>(grad.data_ptr());
  const auto* hazards_data = static_cast<const scalar_t*>(hazards.data_ptr());
  const std::vector<Outcome> all = read_all(outcomes, settings.patients);

  // Groups of fixed size, summed in their order: the same bits for any number of threads.
  constexpr int64_t kGroup = Outcomes::kAtOnce;
  constexpr int64_t kWorthAThread = 16384;  // values
  const int64_t groups = (settings.patients + kGroup - 1) / kGroup;
  const int64_t group_values = hazards.numel() / std::max<int64_t>(1, groups) + 1;
  std::vector<double> group_nll(groups);

  parallel_for(0, groups, std::max<int64_t>(1, kWorthAThread / group_values),
               [&](int64_t first_group, int64_t last_group) {
                 const KeepDenormals denormals;
                 Turned<scalar_t> visits(layout, settings.classes);
                 Outcome group_outcomes[kGroup];
                 double patient_nll[kGroup];
                 for (int64_t group = first_group; group < last_group; ++group) {
                   const int64_t first = group * kGroup;
                   const int64_t count = std::min(kGroup, settings.patients - first);
                   for (int64_t i = 0; i < count; ++i)
                     group_outcomes[i] = all[layout.patient_of_rank(first + i)];
                   if (settings.link == Link::kSoftmax) {
                     visits.gather(hazards_data, first, group_outcomes, count);
                     Settings group_settings = settings;
                     group_settings.slots = visits.slots();
                     grad_t* group_grad = needs_grad ? visits.zero_gradients() : nullptr;
                     rows_nll(group_settings,
                              Rows<scalar_t>{visits.values(), group_grad, group_outcomes, count},
                              patient_nll);
                     if (needs_grad) visits.scatter_gradients(grad_data);
                   } else {
                     ranks_nll(
                         settings,
                         RankRows<scalar_t>{hazards_data, needs_grad ? grad_data : nullptr,
                                            hazards.numel(), layout.row_starts(),
                                            layout.most_visits(), first, group_outcomes, count},
                         patient_nll);
                   }
                   for (int64_t i = 0; i < count; ++i) {
                     const double weighted = patient_nll[i] * group_outcomes[i].weight;
                     if (!reduces)
                       nll_data[layout.patient_of_rank(first + i)] = static_cast<nll_t>(weighted);
                     group_nll[group] += weighted;
                   }
                 }
               });
  if (reduces) {
    double total = 0;
    for (const double sum : group_nll) total += sum;
    *nll_data = static_cast<nll_t>(total * settings.share);
  }
  return {nll, grad};
}

std::tuple<Tensor, Tensor> packed_survival_nll(
    const Tensor& hazards, const Tensor& row_starts, const Tensor& unsorted_indices,
    const Tensor& last_rows, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, int64_t link,
    bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  if (hazards.dim() < 1 || hazards.dim() > 2) {
    throw std::invalid_argument("hazards: expected shape [n_visits] or [n_visits, K]");
  }
  const bool competing = hazards.dim() == 2;
  check_options("packed_survival_nll", competing, link, eps, reduction);
  const int64_t classes = competing ? hazards.size(1) : 1;
  const int64_t causes = causes_of(classes, link);
  const PackedLayout layout("packed_survival_nll", hazards.size(0), row_starts, unsorted_indices,
                            last_rows);
  check_row_length(layout.most_visits(), classes);
  const Outcomes outcomes(layout.patients(), VisitMask(layout.lengths()), causes,
                          competing ? "event_types" : "event_indicators", event_times, event_types,
                          entry_times, sample_weight);
  Settings settings{};
  settings.patients = layout.patients();
  settings.classes = classes;
  settings.link = static_cast<Link>(link);
  settings.censored_included = censored_included;
  settings.eps = eps;
  settings.reduction = static_cast<Reduction>(reduction);
  const bool is_mean = settings.reduction == Reduction::kMean;
  settings.share = is_mean ? 1.0 / static_cast<double>(settings.patients) : 1.0;
  const Tensor rows = torch::stable::contiguous(hazards);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), "hazards", [&](auto tag) {
    result = run<typename decltype(tag)::type>(settings, layout, rows, outcomes, needs_grad);
  });
  return result;
}

}  // namespace
}  // namespace ehrseq::survival

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("packed_survival_nll", EHRSEQ_BOX(&ehrseq::survival::packed_survival_nll));
}
