// What the CPU's loss of a horizon reads of patients and visits, padded or packed: event times,
// weights, and which visits count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "common/survival/columns.h"
#include "common/survival/faults.h"
#include "common/survival/visit_blocks.h"
#include "fixed_horizon/rows.h"

namespace ehrseq::fixed_horizon {

using namespace ehrseq::survival;  // NOLINT: what the losses of visits share

// Numbers of visits [B, V] or [n_visits], as those of one patient after the other.
class VisitColumn {
 public:
  explicit VisitColumn(const OptionalTensor& tensor) : tensor_(contiguous_or_none(tensor)) {
    if (!tensor_.has_value()) return;
    column_ = Column::of_visits(*tensor_);
    data_ = static_cast<const char*>(tensor_->const_data_ptr());
    bytes_ = static_cast<int64_t>(tensor_->element_size());
  }

  bool given() const { return column_.has_value(); }
  double at(int64_t row) const { return column_->at<double>(row); }

  ScalarType dtype() const { return tensor_->scalar_type(); }

  // Where the numbers are stored, of the type that dtype() is.
  template <typename T>
  const T* stored_at(int64_t row) const {
    return reinterpret_cast<const T*>(data_) + row;
  }

  void prefetch(int64_t row, int64_t count) const {
    const char* end = data_ + (row + count) * bytes_;
    for (const char* at = data_ + row * bytes_; at < end; at += 64) __builtin_prefetch(at);
  }

  // Visits first..first + count of row number `row`, of a padded tensor.
  void read(int64_t row, int64_t count, double* to) const { column_->read(row, row + count, to); }

  // The visits of `count` ranks from `first` on, `slots` of each.
  void gather(const RankLayout& ranks, int64_t first, int64_t count, int64_t slots,
              double* to) const {
    double at_visit[kGroupPatients];
    for (int64_t visit = 0; visit < slots; ++visit) {
      const int64_t present = std::clamp<int64_t>(ranks.ranks_at(visit) - first, 0, count);
      const int64_t row = ranks.row(first, visit);
      column_->read(row, row + present, at_visit);
      for (int64_t i = 0; i < present; ++i) to[i * slots + visit] = at_visit[i];
    }
  }

 private:
  OptionalTensor tensor_;
  std::optional<Column> column_;
  const char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// What labels are made of, and weights.
struct Targets {
  const char* operation;
  Column event_times;
  Column seen;
  VisitColumn visit_times;
  VisitColumn visit_weights;
  std::optional<Column> sample_weights;

  bool by_index() const { return !visit_times.given(); }
};

// Where visits are their own times.
inline Range range_of(const Outcome& outcome, int64_t visits) {
  const auto guess = [&](double time) {
    return static_cast<int64_t>(time > 0 ? std::min(time, static_cast<double>(visits)) : 0);
  };
  return range_near({guess(outcome.last()), guess(outcome.first_within())}, outcome, visits,
                    [](int64_t visit) { return static_cast<double>(visit); });
}

// The patients of a group: what is known of them and of their visits.
class GroupReader {
 public:
  explicit GroupReader(const Targets& targets) : targets_(targets) {}

  // False where a patient's outcome is impossible or a mask malformed.
  template <typename Layout>
  bool read(const Layout& layout, int64_t first, int64_t count) {
    read_weights(layout, first, count);
    count_visits(layout);
    read_column(layout, targets_.event_times, event_times_);
    read_column(layout, targets_.seen, seen_);
    bool possible = true;
    for (int64_t i = 0; i < count; ++i) {
      possible &= visits_[i] != kMalformed && (seen_[i] == 0 || seen_[i] == 1);
      possible &= targets_.by_index() ? event_times_[i] >= 0 : !std::isnan(event_times_[i]);
      possible &= !(sample_weights_[i] < 0);
    }
    return possible;
  }

  // What is enough for patients whose ranges are known.
  template <typename Layout>
  void read_weights(const Layout& layout, int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    slots_ = layout.visits_at_most(first);
    if (targets_.sample_weights) {
      read_column(layout, *targets_.sample_weights, sample_weights_);
    } else {
      std::fill_n(sample_weights_, count, 1.0);
    }
  }

  // Those of the visits of all patients, for patient().
  void read_visits(const PaddedVisits&) {
    read_numbers([&](const VisitColumn& column, double* to) {
      for (int64_t i = 0; i < count_; ++i) {
        column.read((first_ + i) * slots_, visits_[i], to + i * slots_);
      }
    });
  }

  void read_visits(const PackedPatients& layout) {
    read_numbers([&](const VisitColumn& column, double* to) {
      column.gather(layout.ranks(), first_, count_, slots_, to);
    });
  }

  // The visits that count, where that is a range; kNoRange otherwise. Of packed visits after
  // read_visits.
  Range range(const PaddedVisits&, const Settings& settings, int64_t i) const {
    if (targets_.visit_weights.given()) return kNoRange;
    const Outcome outcome(settings, event_times_[i], seen_[i] != 0);
    if (targets_.by_index()) return range_of(outcome, visits_[i]);
    return range_at(outcome, (first_ + i) * slots_, visits_[i]);
  }

  Range range(const PackedPatients&, const Settings& settings, int64_t i) const {
    if (targets_.visit_weights.given()) return kNoRange;
    const Outcome outcome(settings, event_times_[i], seen_[i] != 0);
    if (targets_.by_index()) return range_of(outcome, visits_[i]);
    return range_of_times(outcome, &times_[i * slots_], visits_[i]);
  }

  // Before range() of that patient: parts of rows are read, which the processor's own prefetcher
  // cannot follow.
  void prefetch_times(const PaddedVisits&, int64_t i) const {
    if (i < count_ && targets_.visit_times.given()) {
      targets_.visit_times.prefetch((first_ + i) * slots_, visits_[i]);
    }
  }
  void prefetch_times(const PackedPatients&, int64_t) const {}

  // Whether a range depends on what read_visits reads.
  bool ranges_need_visits(const PaddedVisits&) const { return false; }
  bool ranges_need_visits(const PackedPatients&) const { return targets_.visit_times.given(); }

  int64_t slots() const { return slots_; }
  double weight(int64_t i) const { return sample_weights_[i]; }
  const double* weights() const { return sample_weights_; }

  Visits patient(int64_t i) const {
    const auto of = [&](const VisitColumn& column, const std::vector<double>& values) {
      return column.given() ? &values[i * slots_] : nullptr;
    };
    const double* times = targets_.by_index() ? times_.data() : of(targets_.visit_times, times_);
    return {visits_[i],      times,         of(targets_.visit_weights, weights_),
            event_times_[i], seen_[i] != 0, sample_weights_[i]};
  }

 private:
  Range range_at(const Outcome& outcome, int64_t row, int64_t visits) const {
    const VisitColumn& column = targets_.visit_times;
    switch (column.dtype()) {
      case ScalarType::Float:
        return range_of_times(outcome, column.stored_at<float>(row), visits);
      case ScalarType::Double:
        return range_of_times(outcome, column.stored_at<double>(row), visits);
      case ScalarType::Int:
        return range_of_times(outcome, column.stored_at<int32_t>(row), visits);
      case ScalarType::Long:
        return range_of_times(outcome, column.stored_at<int64_t>(row), visits);
      default: {  // narrow numbers, which doubles hold
        thread_local std::vector<double> times;
        times.resize(visits + 1);
        column.read(row, visits, times.data());
        return range_of_times(outcome, times.data(), visits);
      }
    }
  }

  void read_column(const PaddedVisits&, const Column& column, double* to) const {
    column.read(first_, first_ + count_, to);
  }

  void read_column(const PackedPatients& layout, const Column& column, double* to) const {
    for (int64_t i = 0; i < count_; ++i) to[i] = column.at<double>(layout.patient(first_ + i));
  }

  void count_visits(const PaddedVisits& layout) {
    layout.mask().count_visits(first_, first_ + count_, visits_);
  }

  void count_visits(const PackedPatients& layout) {
    for (int64_t i = 0; i < count_; ++i) visits_[i] = layout.visits(layout.patient(first_ + i));
  }

  template <typename Read>
  void read_numbers(const Read& read) {
    const auto take = [&](const VisitColumn& column, std::vector<double>& to) {
      if (!column.given()) return;
      to.resize(count_ * slots_ + 1);  // whose begin exists
      read(column, to.data());
    };
    take(targets_.visit_times, times_);
    take(targets_.visit_weights, weights_);
    if (!targets_.by_index()) return;
    times_.resize(slots_ + 1);
    std::iota(times_.begin(), times_.end(), 0.0);
  }

  const Targets& targets_;
  int64_t first_ = 0;
  int64_t count_ = 0;
  int64_t slots_ = 0;
  int64_t visits_[kGroupPatients] = {};
  double event_times_[kGroupPatients] = {};
  double seen_[kGroupPatients] = {};
  double sample_weights_[kGroupPatients] = {};
  std::vector<double> times_;
  std::vector<double> weights_;
};

// Throws std::invalid_argument: the first patient at fault, and how many there are.
template <typename Layout>
[[noreturn]] void refuse_values(const Targets& targets, const Layout& layout) {
  refuse_malformed(layout);
  Faults impossible, unknown, timeless, of_visits, of_patients;
  const bool by_index = targets.by_index();
  for (int64_t patient = 0; patient < layout.patients(); ++patient) {
    const double time = targets.event_times.at<double>(patient);
    if (by_index ? !(time >= 0) : std::isnan(time)) impossible.add(patient);
    const double kind = targets.seen.at<double>(patient);
    if (kind != 0 && kind != 1) unknown.add(patient);
    if (targets.sample_weights && targets.sample_weights->at<double>(patient) < 0) {
      of_patients.add(patient);
    }
  }
  for_each_visit(layout, [&](int64_t patient, int64_t visit, int64_t row) {
    if (targets.visit_times.given() && std::isnan(targets.visit_times.at(row))) {
      timeless.add(patient, visit);
    }
    if (targets.visit_weights.given() && targets.visit_weights.at(row) < 0) {
      of_visits.add(patient, visit);
    }
  });
  if (impossible.count() > 0) {
    impossible.refuse(
        by_index ? "event_times must be visits, counted from 0" : "event_times must not be NaN",
        short_text(targets.event_times.at<double>(impossible.patient())));
  }
  if (unknown.count() > 0) {
    unknown.refuse("event_indicators must be 0 (censored) or 1 (event)",
                   short_text(targets.seen.at<double>(unknown.patient())));
  }
  if (timeless.count() > 0) timeless.refuse("visit_times must not be NaN", "nan");
  if (of_visits.count() > 0) {
    const int64_t row = layout.row(of_visits.patient(), of_visits.visit());
    of_visits.refuse("visit_weight must not be negative",
                     short_text(targets.visit_weights.at(row)));
  }
  of_patients.refuse("sample_weight must not be negative",
                     short_text(targets.sample_weights->at<double>(of_patients.patient())));
}

}  // namespace ehrseq::fixed_horizon
