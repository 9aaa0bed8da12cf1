// Rows of the padded layout.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "survival_nll/likelihood.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival::EHRSEQ_ISA {

inline Trials trials_of(const Outcome& outcome, const LossSettings& settings) {
  const int64_t time = outcome.time * settings.classes;
  return {outcome.entry * settings.classes, time,
          time + (settings.censored_included ? settings.classes : 0),
          outcome.type > 0 ? time + outcome.type - 1 : -1};
}

template <typename scalar_t>
accumulator_t<scalar_t> grad_scale(const Outcome& outcome, const LossSettings& settings) {
  return signed_zero(static_cast<accumulator_t<scalar_t>>(outcome.weight * settings.share));
}

// The next rows' visits at risk are prefetched while this row is computed: only parts of rows are
// read, which the processor's own prefetcher cannot follow.
constexpr int64_t kRowsAhead = 8;

template <typename scalar_t>
EHRSEQ_INLINE void prefetch(const LossSettings& settings, const Rows<scalar_t>& rows,
                            int64_t patient) {
  if (patient >= rows.patients) return;
  const Outcome& outcome = rows.outcomes[patient];
  const scalar_t* row = rows.values + patient * settings.slots * settings.classes;
  const scalar_t* end = row + (outcome.time + 1) * settings.classes;
  for (row += outcome.entry * settings.classes; row < end; row += 64 / sizeof(scalar_t)) {
    __builtin_prefetch(row);
  }
}

template <typename scalar_t>
bool probabilities_fit(const LossSettings& settings, const Rows<scalar_t>& rows) {
  const int64_t row_length = settings.slots * settings.classes;
  bool improbable = false;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const scalar_t* row = rows.values + i * row_length;
    const Trials trials = trials_of(rows.outcomes[i], settings);
    improbable |= any_improbable(row + trials.begin, trials.survived_end - trials.begin);
    if (trials.event >= 0) improbable |= any_improbable(row + trials.event, 1);
  }
  return !improbable;
}

template <typename Likelihood, typename scalar_t>
void bernoulli_rows(const LossSettings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  Mask<T> inside = ~Mask<T>{};
  Group<OutcomeReader::kAtOnce> group;
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(settings, rows, i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch(settings, rows, i + kRowsAhead);
    group.set(
        i, nll_of_trials<Likelihood>(settings.eps, rows.values + i * row_length,
                                     rows.grad ? rows.grad + i * row_length : nullptr, row_length,
                                     trials_of(rows.outcomes[i], settings),
                                     grad_scale<scalar_t>(rows.outcomes[i], settings), &inside));
  }
  group.template finish<Likelihood>(rows.patients, nll);
  if (!all_set<T>(inside)) *rows.possible = probabilities_fit(settings, rows);
}

template <typename scalar_t>
void softmax_rows(const LossSettings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  Softmax<T> softmax(settings.classes);
  Group<OutcomeReader::kAtOnce> group;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    const bool time_counts = outcome.type > 0 || settings.censored_included;
    group.set(i, softmax.nll_of_visits(rows.values + i * row_length,
                                       rows.grad ? rows.grad + i * row_length : nullptr,
                                       outcome.entry, outcome.time, time_counts ? outcome.type : -1,
                                       grad_scale<scalar_t>(outcome, settings)));
  }
  group.template finish<FromLogits<T>>(rows.patients, nll);
}

template <typename scalar_t>
void rows_nll(const LossSettings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  switch (settings.link) {
    case Link::kProbabilities:
      return bernoulli_rows<FromProbabilities<T>>(settings, rows, nll);
    case Link::kSigmoid:
      return bernoulli_rows<FromLogits<T>>(settings, rows, nll);
    case Link::kSoftmax:
      return softmax_rows(settings, rows, nll);
    case Link::kCloglog:
      return bernoulli_rows<FromCloglog<T>>(settings, rows, nll);
  }
}

}  // namespace ehrseq::survival::EHRSEQ_ISA
