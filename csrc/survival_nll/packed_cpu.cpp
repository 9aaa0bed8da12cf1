// The survival losses of packed batches on the CPU. The visits of a patient stand far apart in
// time-major rows, so those at risk are brought together for some patients at a time, given to the
// kernel of the padded layout, and their gradients put back.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "survival_nll/outcomes.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival {
namespace {

// Visit t of patient p is row row_starts[t] + ranks[p].
class PackedLayout {
 public:
  PackedLayout(int64_t n_visits, const Tensor& row_starts, const Tensor& ranks,
               const Tensor& last_rows)
      : row_starts_(torch::stable::contiguous(row_starts)),
        ranks_(torch::stable::contiguous(ranks)),
        patients_(ranks.numel()) {
    const auto last = torch::stable::contiguous(last_rows);
    for (const Tensor& tensor : {row_starts_, ranks_, last}) {
      if (tensor.scalar_type() != ScalarType::Long || tensor.dim() != 1) refuse();
    }
    const int64_t* begin = starts();
    const int64_t* end = begin + row_starts_.numel();
    if (begin == end || *begin != 0 || end[-1] != n_visits || last.numel() != patients_) refuse();
    for (const int64_t* start = begin; start + 1 < end; ++start) {
      if (start[0] >= start[1] || start[1] - start[0] > patients_) refuse();
    }
    const auto* last_row = static_cast<const int64_t*>(last.data_ptr());
    lengths_.resize(patients_);
    for (int64_t patient = 0; patient < patients_; ++patient) {
      const int64_t length = std::upper_bound(begin, end, last_row[patient]) - begin;
      const bool fits = rank(patient) >= 0 && length > 0 && last_row[patient] < n_visits &&
                        begin[length - 1] + rank(patient) == last_row[patient];
      if (!fits) refuse();
      lengths_[patient] = length;
    }
  }

  int64_t row(int64_t patient, int64_t visit) const { return starts()[visit] + rank(patient); }
  int64_t patients() const { return patients_; }
  const std::vector<int64_t>& lengths() const { return lengths_; }

 private:
  [[noreturn]] static void refuse() {
    throw std::invalid_argument(
        "packed_survival_nll: row_starts, unsorted_indices and last_rows "
        "are not those of a batch with these visits");
  }

  const int64_t* starts() const { return static_cast<const int64_t*>(row_starts_.data_ptr()); }
  int64_t rank(int64_t patient) const {
    return static_cast<const int64_t*>(ranks_.data_ptr())[patient];
  }

  Tensor row_starts_;
  Tensor ranks_;
  int64_t patients_;
  std::vector<int64_t> lengths_;
};

// The visits at risk of some patients, brought together and put back; `slots` per patient.
template <typename scalar_t>
class Gathered {
 public:
  Gathered(const PackedLayout& layout, const scalar_t* hazards, int64_t classes)
      : layout_(layout), hazards_(hazards), classes_(classes) {}

  // Hazards of patients from `first` on, up to their event times.
  void gather(int64_t first, const Outcome* outcomes, int64_t patients) {
    slots_ = 0;
    for (int64_t i = 0; i < patients; ++i) slots_ = std::max(slots_, outcomes[i].time + 1);
    values_.resize(patients * slots_ * classes_);
    for (int64_t i = 0; i < patients; ++i) {
      for (int64_t visit = outcomes[i].entry; visit <= outcomes[i].time; ++visit) {
        const scalar_t* from = hazards_ + layout_.row(first + i, visit) * classes_;
        std::copy(from, from + classes_, values_.data() + (i * slots_ + visit) * classes_);
      }
    }
  }

  saved_grad_t<scalar_t>* zero_gradients() {
    grads_.assign(values_.size(), saved_grad_t<scalar_t>(0));
    return grads_.data();
  }

  void scatter_gradients(int64_t first, const Outcome* outcomes, int64_t patients,
                         saved_grad_t<scalar_t>* grad) const {
    for (int64_t i = 0; i < patients; ++i) {
      for (int64_t visit = outcomes[i].entry; visit <= outcomes[i].time; ++visit) {
        const auto* from = grads_.data() + (i * slots_ + visit) * classes_;
        std::copy(from, from + classes_, grad + layout_.row(first + i, visit) * classes_);
      }
    }
  }

  const scalar_t* values() const { return values_.data(); }
  int64_t slots() const { return slots_; }

 private:
  const PackedLayout& layout_;
  const scalar_t* hazards_;
  int64_t classes_;
  int64_t slots_ = 0;
  std::vector<scalar_t> values_;
  std::vector<saved_grad_t<scalar_t>> grads_;
};

template <typename T>
constexpr ScalarType kDtypeOf = ScalarType::Undefined;
template <>
constexpr ScalarType kDtypeOf<float> = ScalarType::Float;
template <>
constexpr ScalarType kDtypeOf<double> = ScalarType::Double;
template <>
constexpr ScalarType kDtypeOf<BFloat16> = ScalarType::BFloat16;

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
  std::fill(grad_data, grad_data + grad.numel(), grad_t(0));

  // A packed batch is a thousandth of the work of its LSTM: one thread, patients in their order.
  Gathered<scalar_t> visits(layout, static_cast<const scalar_t*>(hazards.data_ptr()),
                            settings.classes);
  double total = 0;
  for (int64_t first = 0; first < settings.patients; first += Outcomes::kAtOnce) {
    const int64_t count = std::min(Outcomes::kAtOnce, settings.patients - first);
    Outcome group[Outcomes::kAtOnce];
    double patient_nll[Outcomes::kAtOnce];
    if (!outcomes.read(first, first + count, group)) outcomes.refuse();
    visits.gather(first, group, count);
    Settings group_settings = settings;
    group_settings.slots = visits.slots();
    grad_t* group_grad = needs_grad ? visits.zero_gradients() : nullptr;
    rows_nll(group_settings, Rows<scalar_t>{visits.values(), group_grad, group, count},
             patient_nll);
    if (needs_grad) visits.scatter_gradients(first, group, count, grad_data);
    for (int64_t i = 0; i < count; ++i) {
      const double weighted = patient_nll[i] * group[i].weight;
      if (!reduces) nll_data[first + i] = static_cast<nll_t>(weighted);
      total += weighted;
    }
  }
  if (reduces) *nll_data = static_cast<nll_t>(total * settings.share);
  return {nll, grad};
}

std::tuple<Tensor, Tensor> packed_survival_nll(
    const Tensor& hazards, const Tensor& row_starts, const Tensor& unsorted_indices,
    const Tensor& last_rows, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, int64_t link,
    bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  const bool competing = hazards.dim() == 2;
  const int64_t classes = competing ? hazards.size(1) : 1;
  const int64_t causes = static_cast<Link>(link) == Link::kSoftmax ? classes - 1 : classes;
  if (hazards.dim() < 1 || hazards.dim() > 2 || causes < 1) {
    throw std::invalid_argument("hazards: expected shape [n_visits] or [n_visits, K]");
  }
  const PackedLayout layout(hazards.size(0), row_starts, unsorted_indices, last_rows);
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
  m.impl("packed_survival_nll", TORCH_BOX(&ehrseq::survival::packed_survival_nll));
}
