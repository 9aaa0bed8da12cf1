// Patients of a padded tensor and of a packed batch, for the loop of groups.h.
//
// Settings have `patients`, `slots` and `classes` (values per visit), and beside them, in their
// namespace:
//   rows_nll(settings, rows, nll)           the loss of each, unweighted, and the gradient of the
//                                           weighted one
//   slots_read(settings, outcomes, count)   how many visits of these patients, which are those of
//                                           neighbouring ranks, are to be put into rows
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/rows.h"
#include "common/survival/saved_grad.h"
#include "common/survival/transposed_visits.h"

namespace ehrseq::survival {

// Patients whose visits are rows of a padded tensor.
template <typename scalar_t, typename Settings>
class PaddedPatients {
 public:
  using grad_t = saved_grad_t<scalar_t>;
  static constexpr int64_t kWorthAThread = 32768;

  // `grad` is null where none is needed.
  PaddedPatients(const Settings& settings, const OutcomeReader& outcomes, const scalar_t* values,
                 grad_t* grad)
      : settings_(settings), outcomes_(outcomes), values_(values), grad_(grad) {}

  struct Worker {
    const PaddedPatients& all;

    bool nll(int64_t first, int64_t count, Outcome* outcomes, double* patient_nll) {
      if (!all.outcomes_.read(first, first + count, outcomes)) {
        all.possible_.store(false, std::memory_order_relaxed);
        return false;
      }
      const int64_t row_length = all.row_length();
      const int64_t offset = first * row_length;
      grad_t* grad = all.grad_ ? all.grad_ + offset : nullptr;
      // All zeros first, while the rows fit the cache: one fill of fixed size costs less than the
      // exact remainder of each row, whose length no branch predictor guesses.
      if (grad) std::fill(grad, grad + count * row_length, grad_t(0));
      bool possible = true;
      rows_nll(all.settings_,
               Rows<scalar_t>{all.values_ + offset, grad, outcomes, count, &possible, first},
               patient_nll);
      if (!possible) all.possible_.store(false, std::memory_order_relaxed);
      return possible;
    }
  };

  Worker worker() const { return {*this}; }
  int64_t patient(int64_t number) const { return number; }
  int64_t values_per_group() const {
    return std::max<int64_t>(1, OutcomeReader::kAtOnce * row_length());
  }
  // False once an impossible outcome or value was read.
  bool possible() const { return possible_.load(); }

 private:
  int64_t row_length() const { return settings_.slots * settings_.classes; }

  const Settings& settings_;
  const OutcomeReader& outcomes_;
  const scalar_t* values_;
  grad_t* grad_;
  mutable std::atomic<bool> possible_{true};
};

// Patients by rank, whose visits are transposed into rows of the padded layout, and their gradients
// back.
template <typename scalar_t, typename Settings>
class RankedPatients {
 public:
  using grad_t = saved_grad_t<scalar_t>;
  static constexpr int64_t kWorthAThread = 16384;

  // `grad` is null where none is needed; `count` is how many values there are.
  RankedPatients(const Settings& settings, const RankLayout& layout,
                 const std::vector<Outcome>& outcomes, const scalar_t* values, grad_t* grad,
                 int64_t count)
      : settings_(settings),
        layout_(layout),
        outcomes_(outcomes),
        values_(values),
        grad_(grad),
        count_(count) {}

  class Worker {
   public:
    explicit Worker(const RankedPatients& all)
        : all_(all), visits_(all.layout_, all.settings_.classes) {}

    bool nll(int64_t first, int64_t count, Outcome* outcomes, double* patient_nll) {
      all_.copy_outcomes(first, count, outcomes);
      Settings settings = all_.settings_;
      settings.slots = slots_read(settings, outcomes, count);
      visits_.gather(all_.values_, first, count, settings.slots);
      grad_t* grad = all_.grad_ ? visits_.zero_gradients() : nullptr;
      bool possible = true;
      rows_nll(settings, Rows<scalar_t>{visits_.values(), grad, outcomes, count, &possible, first},
               patient_nll);
      if (!possible) {
        all_.possible_.store(false, std::memory_order_relaxed);
        return false;
      }
      if (grad) visits_.scatter_gradients(all_.grad_);
      return true;
    }

   private:
    const RankedPatients& all_;
    TransposedVisits<scalar_t> visits_;
  };

  Worker worker() const { return Worker(*this); }
  int64_t patient(int64_t rank) const { return layout_.patient_of_rank(rank); }
  int64_t values_per_group() const {
    constexpr int64_t kGroup = OutcomeReader::kAtOnce;
    const int64_t groups = (settings_.patients + kGroup - 1) / kGroup;
    return count_ / std::max<int64_t>(1, groups) + 1;
  }
  // False once a value was refused.
  bool possible() const { return possible_.load(); }

 protected:
  void copy_outcomes(int64_t first, int64_t count, Outcome* outcomes) const {
    for (int64_t i = 0; i < count; ++i) outcomes[i] = outcomes_[patient(first + i)];
  }

  const Settings& settings_;
  const RankLayout& layout_;
  const std::vector<Outcome>& outcomes_;
  const scalar_t* values_;
  grad_t* grad_;
  int64_t count_;
  mutable std::atomic<bool> possible_{true};
};

}  // namespace ehrseq::survival
