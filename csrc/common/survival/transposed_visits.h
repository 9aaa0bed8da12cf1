// The visits of a packed batch as rows of the padded layout, for losses that go over them one
// patient at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::survival {

// The visits of some neighbouring ranks as rows of the padded layout, `slots` per patient.
template <typename scalar_t>
class TransposedVisits {
 public:
  using grad_t = saved_grad_t<scalar_t>;

  TransposedVisits(const RankLayout& layout, int64_t classes)
      : layout_(layout), classes_(classes) {}

  // The first `slots` visits of `patients` ranks from `first` on; what is past a patient's visits
  // is not set.
  void gather(const scalar_t* hazards, int64_t first, int64_t patients, int64_t slots) {
    first_ = first;
    patients_ = patients;
    slots_ = slots;
    values_.resize(patients * slots_ * classes_);
    for (int64_t visit = 0; visit < slots_; ++visit) {
      const scalar_t* from = hazards + layout_.row(first, visit) * classes_;
      copy_visit(patients_at(visit), from, classes_, values_.data() + visit * classes_,
                 slots_ * classes_);
    }
  }

  grad_t* zero_gradients() {
    grads_.assign(values_.size(), grad_t(0));
    return grads_.data();
  }

  // Every visit of these patients is written: zeros after the slots.
  void scatter_gradients(grad_t* grad) const {
    for (int64_t visit = 0; visit < slots_; ++visit) {
      grad_t* to = grad + layout_.row(first_, visit) * classes_;
      copy_visit(patients_at(visit), grads_.data() + visit * classes_, slots_ * classes_, to,
                 classes_);
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
  // One visit of each patient, `classes` values, from one stride between patients to another. A
  // copy of known size is an instruction or two, any other a call.
  template <typename T>
  void copy_visit(int64_t patients, const T* from, int64_t from_stride, T* to,
                  int64_t to_stride) const {
    const auto copy = [&](auto classes) {
      for (int64_t i = 0; i < patients; ++i) {
        std::copy_n(from + i * from_stride, static_cast<int64_t>(classes), to + i * to_stride);
      }
    };
    switch (classes_) {
      case 1:
        return copy(std::integral_constant<int64_t, 1>{});
      case 2:
        return copy(std::integral_constant<int64_t, 2>{});
      case 3:
        return copy(std::integral_constant<int64_t, 3>{});
      case 4:
        return copy(std::integral_constant<int64_t, 4>{});
      default:
        return copy(classes_);
    }
  }

  int64_t patients_at(int64_t visit) const {
    return std::clamp<int64_t>(layout_.ranks_at(visit) - first_, 0, patients_);
  }

  const RankLayout& layout_;
  int64_t classes_;
  int64_t first_ = 0;
  int64_t patients_ = 0;
  int64_t slots_ = 0;
  std::vector<scalar_t> values_;
  std::vector<grad_t> grads_;
};

inline std::vector<Outcome> read_all(const OutcomeReader& outcomes, int64_t patients) {
  std::vector<Outcome> all(patients);
  for (int64_t first = 0; first < patients; first += OutcomeReader::kAtOnce) {
    const int64_t last = std::min(first + OutcomeReader::kAtOnce, patients);
    if (!outcomes.read(first, last, all.data() + first)) outcomes.refuse();
  }
  return all;
}

}  // namespace ehrseq::survival
