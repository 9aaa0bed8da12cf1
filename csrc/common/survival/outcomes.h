// The outcome of each patient: visits, entry, time, event, weight. Values are read and checked
// here, so that the kernels can rely on them.
#pragma once

#include <cstdint>
#include <optional>

#include "common/survival/columns.h"
#include "common/survival/visit_mask.h"

namespace ehrseq::survival {

struct Outcome {
  int64_t entry;
  int64_t time;
  int64_t type;  // 0 censored, 1..causes
  double weight;
  int64_t visits;
  double fraction = 1;  // of the interval at the event time
};

class OutcomeReader {
 public:
  static constexpr int64_t kAtOnce = 64;

  // Tensors that expect_outcomes has checked.
  OutcomeReader(int64_t patients, VisitMask mask, int64_t causes, const char* types_name,
                const Tensor& event_times, const Tensor& event_types,
                const OptionalTensor& entry_times, const OptionalTensor& sample_weight,
                const OptionalTensor& fraction = std::nullopt);

  // Patients begin..end, at most kAtOnce. False if one of them is impossible: refuse() says why.
  bool read(int64_t begin, int64_t end, Outcome* outcomes) const;

  // Throws std::invalid_argument: what is wrong, the first patient at fault, and how many there
  // are.
  [[noreturn]] void refuse() const;

  // As refuse(), but returns where no outcome is impossible.
  void refuse_impossible() const;

 private:
  int64_t patients_;
  int64_t causes_;
  const char* types_name_;
  VisitMask mask_;
  Column times_;
  Column types_;
  std::optional<Column> entries_;
  std::optional<Column> weights_;
  std::optional<Column> fractions_;
};

}  // namespace ehrseq::survival
