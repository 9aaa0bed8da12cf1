// The weights of visits, and what the losses of visits refuse: the first visit at fault, and how
// many there are. ehrseq_fast/visitwise.py refuses the same in the same words.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/survival/arguments.h"
#include "common/survival/columns.h"
#include "common/survival/visit_blocks.h"

namespace ehrseq::survival {

class Faults {
 public:
  void add(int64_t patient, int64_t visit = -1) {
    if (count_++ == 0) {
      patient_ = patient;
      visit_ = visit;
    }
  }

  int64_t count() const { return count_; }
  int64_t patient() const { return patient_; }
  int64_t visit() const { return visit_; }

  [[noreturn]] void refuse(const std::string& rule, const std::string& has) const {
    const bool of_visits = visit_ >= 0;
    throw std::invalid_argument(
        rule + ": patient " + std::to_string(patient_) + " has " + has +
        (of_visits ? " at visit " + std::to_string(visit_) + " (visits" : " (patients") +
        " at fault: " + std::to_string(count_) + ")");
  }

 private:
  int64_t count_ = 0;
  int64_t patient_ = -1;
  int64_t visit_ = -1;
};

inline void refuse_malformed(const PaddedVisits& layout) {
  Faults malformed;
  for (int64_t patient = 0; patient < layout.patients(); ++patient) {
    if (layout.visits(patient) == kMalformed) malformed.add(patient);
  }
  if (malformed.count() == 0) return;
  const VisitMask::Fault fault = layout.mask().first_fault(malformed.patient());
  malformed.refuse("sequence_mask must be 1 on a patient's visits and 0 on the padding after them",
                   short_text(fault.value) + " at visit " + std::to_string(fault.visit) +
                       (fault.value == 1 ? ", after a 0" : ""));
}

inline void refuse_malformed(const PackedPatients&) {}

// body(patient, visit, row) of every visit, patients in the caller's order. Throws for a malformed
// mask.
template <typename Layout, typename Body>
void for_each_visit(const Layout& layout, Body&& body) {
  refuse_malformed(layout);
  for (int64_t patient = 0; patient < layout.patients(); ++patient) {
    const int64_t visits = layout.visits(patient);
    for (int64_t visit = 0; visit < visits; ++visit)
      body(patient, visit, layout.row(patient, visit));
  }
}

class WeightsOfVisits {
 public:
  WeightsOfVisits(const OptionalTensor& visit_weight, const OptionalTensor& sample_weight) {
    if (visit_weight.has_value()) of_visits_ = Column::of_visits(*visit_weight);
    if (!sample_weight.has_value()) return;
    of_patients_.resize(sample_weight->size(0));
    Column(*sample_weight).read(0, sample_weight->size(0), of_patients_.data());
  }

  // False where one is negative. A NaN or an infinity is to reach the result.
  template <typename Layout>
  bool read(const Layout& layout, const Block& block, double* weights) const {
    if (of_visits_.has_value()) {
      of_visits_->read(block.row, block.row + block.count, weights);
    } else {
      std::fill_n(weights, block.count, 1.0);
    }
    if (!of_visits_.has_value() && of_patients_.empty()) return true;
    bool fits = true;
    for (int64_t i = 0; i < block.count; ++i) {
      fits &= !(weights[i] < 0);
      if (of_patients_.empty()) continue;
      const double of_patient = of_patients_[layout.patient(block.patient_of(i))];
      fits &= !(of_patient < 0);
      weights[i] *= of_patient;
    }
    return fits;
  }

  template <typename Layout>
  [[noreturn]] void refuse(const Layout& layout) const {
    Faults of_visits, of_patients;
    for_each_visit(layout, [&](int64_t patient, int64_t visit, int64_t row) {
      if (of_visits_.has_value() && of_visits_->at<double>(row) < 0) {
        of_visits.add(patient, visit);
      }
    });
    for (size_t patient = 0; patient < of_patients_.size(); ++patient) {
      if (of_patients_[patient] < 0) of_patients.add(static_cast<int64_t>(patient));
    }
    if (of_visits.count() > 0) {
      const int64_t row = layout.row(of_visits.patient(), of_visits.visit());
      of_visits.refuse("visit_weight must not be negative",
                       short_text(of_visits_->at<double>(row)));
    }
    if (of_patients.count() > 0) {
      of_patients.refuse("sample_weight must not be negative",
                         short_text(of_patients_[of_patients.patient()]));
    }
    throw std::logic_error("visits were refused, but none is at fault");
  }

 private:
  std::optional<Column> of_visits_;
  std::vector<double> of_patients_;
};

}  // namespace ehrseq::survival
