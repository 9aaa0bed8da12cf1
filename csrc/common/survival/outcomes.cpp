#include "common/survival/outcomes.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

namespace ehrseq::survival {
namespace {

std::optional<Column> optional_column(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return Column(*tensor);
}

std::string as_text(double value) {
  if (value != value) return "nan";  // whatever its sign
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string as_text(int64_t value) { return std::to_string(value); }

// Which patients break one rule: the first of them, and how many.
struct Offenders {
  int64_t first = -1;
  int64_t count = 0;

  void add(int64_t patient) {
    if (count++ == 0) first = patient;
  }

  void refuse(const std::string& rule, const std::string& what_the_first_has) const {
    throw std::invalid_argument(rule + ": patient " + as_text(first) + " has " +
                                what_the_first_has + " (patients at fault: " + as_text(count) +
                                ")");
  }
};

}  // namespace

OutcomeReader::OutcomeReader(int64_t patients, VisitMask mask, int64_t causes,
                             const char* types_name, const Tensor& event_times,
                             const Tensor& event_types, const OptionalTensor& entry_times,
                             const OptionalTensor& sample_weight, const OptionalTensor& fraction)
    : patients_(patients),
      causes_(causes),
      types_name_(types_name),
      mask_(std::move(mask)),
      times_(event_times),
      types_(event_types),
      entries_(optional_column(entry_times)),
      weights_(optional_column(sample_weight)),
      fractions_(optional_column(fraction)) {}

bool OutcomeReader::read(int64_t begin, int64_t end, Outcome* outcomes) const {
  int64_t visits[kAtOnce];
  int64_t times[kAtOnce];
  int64_t entries[kAtOnce] = {};
  double types[kAtOnce];
  double weights[kAtOnce];
  mask_.count_visits(begin, end, visits);
  times_.read(begin, end, times);
  types_.read(begin, end, types);
  if (entries_.has_value()) entries_->read(begin, end, entries);
  if (weights_.has_value()) {
    weights_->read(begin, end, weights);
  } else {
    std::fill(weights, weights + kAtOnce, 1.0);
  }

  bool possible = true;
  for (int64_t i = 0; i < end - begin; ++i) {
    const bool type_exists = types[i] >= 0 && types[i] <= static_cast<double>(causes_);
    const int64_t type = type_exists ? static_cast<int64_t>(types[i]) : 0;
    // A malformed mask has a negative number of visits, so no time lies within it.
    possible &= times[i] >= 0 && times[i] < visits[i] && entries[i] >= 0 &&
                entries[i] <= times[i] && type_exists && static_cast<double>(type) == types[i] &&
                !(weights[i] < 0);  // a NaN is to reach the result
    outcomes[i] = {entries[i], times[i], type, weights[i], visits[i]};
  }
  if (!fractions_.has_value()) return possible;
  double fractions[kAtOnce];
  fractions_->read(begin, end, fractions);
  for (int64_t i = 0; i < end - begin; ++i) {
    possible &= fractions[i] >= 0 && fractions[i] <= 1;
    outcomes[i].fraction = fractions[i];
  }
  return possible;
}

void OutcomeReader::refuse() const {
  refuse_impossible();
  throw std::logic_error("outcomes were refused, but none is at fault");
}

void OutcomeReader::refuse_impossible() const {
  Offenders malformed, empty, outside, entered_late, unknown_type, negative, no_fraction;
  for (int64_t i = 0; i < patients_; ++i) {
    int64_t visits;
    mask_.count_visits(i, i + 1, &visits);
    const int64_t time = times_.at<int64_t>(i);
    const int64_t entry = entries_.has_value() ? entries_->at<int64_t>(i) : 0;
    const double type = types_.at<double>(i);
    if (visits == kMalformed) malformed.add(i);
    if (visits == 0) empty.add(i);
    if (time < 0 || time >= visits) outside.add(i);
    if (entry < 0 || entry > time) entered_late.add(i);
    if (!(type >= 0 && type <= static_cast<double>(causes_)) ||
        static_cast<double>(static_cast<int64_t>(type)) != type) {
      unknown_type.add(i);
    }
    if (weights_.has_value() && weights_->at<double>(i) < 0) negative.add(i);
    if (!fractions_.has_value()) continue;
    const auto fraction = fractions_->at<double>(i);
    if (!(fraction >= 0 && fraction <= 1)) no_fraction.add(i);
  }

  if (malformed.count > 0) {
    const VisitMask::Fault fault = mask_.first_fault(malformed.first);
    malformed.refuse(
        "sequence_mask must be 1 on a patient's visits and 0 on the padding after them",
        as_text(fault.value) + " at visit " + as_text(fault.visit) +
            (fault.value == 1 ? ", after a 0" : ""));
  }
  if (empty.count > 0) {
    throw std::invalid_argument("Found " + as_text(empty.count) +
                                " sequences with zero length. All sequences must have at least 1 "
                                "visit. The first is patient " +
                                as_text(empty.first) + ".");
  }
  if (outside.count > 0) {
    int64_t visits;
    mask_.count_visits(outside.first, outside.first + 1, &visits);
    outside.refuse("event_times must be one of the patient's visits, counted from 0",
                   "event time " + as_text(times_.at<int64_t>(outside.first)) + " and " +
                       as_text(visits) + " visits");
  }
  if (entered_late.count > 0) {
    entered_late.refuse("entry_times must lie between 0 and the event time",
                        "entry time " + as_text(entries_->at<int64_t>(entered_late.first)) +
                            " and event time " + as_text(times_.at<int64_t>(entered_late.first)));
  }
  if (unknown_type.count > 0) {
    unknown_type.refuse(
        std::string(types_name_) +
            (causes_ == 1 ? " must be 0 (censored) or 1 (event)"
                          : " must be 0 (censored) or a cause 1.." + as_text(causes_)),
        as_text(types_.at<double>(unknown_type.first)));
  }
  if (negative.count > 0) {
    negative.refuse("sample_weight must not be negative",
                    as_text(weights_->at<double>(negative.first)));
  }
  if (no_fraction.count > 0) {
    no_fraction.refuse("fraction must be in [0, 1]",
                       as_text(fractions_->at<double>(no_fraction.first)));
  }
}

}  // namespace ehrseq::survival
