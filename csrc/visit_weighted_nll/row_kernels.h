// Rows whose visits have weights. A weight is a power of a product's factor, so here each trial's
// logarithm is taken.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "survival_nll/row_kernels.h"
#include "visit_weighted_nll/rows.h"

namespace ehrseq::survival::EHRSEQ_ISA {

// A gradient's scale of each visit; never +0, as in likelihood.h.
template <typename T>
EHRSEQ_INLINE Lanes<T> scaled(const Lanes<T>& weights, T scale) {
  const Lanes<T> scales = weights * scale;
  return scales == T(0) ? broadcast(T(-0.0)) : scales;
}

// What a kernel finds of a group's rows.
template <typename T>
struct Found {
  Mask<T> inside = ~Mask<T>{};  // as in FromProbabilities::join
  Mask<T> negative{};           // weights
};

// As nll_of_trials, with weights at the row's positions.
template <typename Likelihood, typename T, typename scalar_t, typename grad_t>
EHRSEQ_INLINE double weighted_nll_of_trials(double eps, const scalar_t* row, grad_t* grad,
                                            int64_t row_length, const Trials& trials,
                                            const T* weights, T scale, Found<T>* found) {
  Likelihood likelihood(eps);
  const int64_t end = trials.end();
  int64_t at = trials.begin;
  for (; at + kLanes<T> <= trials.certain_end; at += kLanes<T>) {
    const Lanes<T> weight = load(weights + at);
    found->negative |= weight < T(0);
    likelihood.weigh(weight);
    const Lanes<T> slopes = likelihood.survived(load(row + at), scaled(weight, scale));
    if (grad != nullptr) store(grad + at, slopes);
  }
  for (; at < end; at += kLanes<T>) {
    const Mask<T> position = lane_numbers<T>();
    const Mask<T> event = position == static_cast<bits_t<T>>(trials.event - at);
    const Mask<T> survived = position < static_cast<bits_t<T>>(trials.survived_end - at);
    const Mask<T> counts = event | survived;
    const Lanes<T> weight = only_where<T>(counts, load_within<T>(weights, at, row_length));
    found->negative |= weight < T(0);
    likelihood.weigh(weight);
    const Lanes<T> slopes =
        likelihood.mixed(load_within<T>(row, at, row_length), scaled(weight, scale), event, counts);
    if (grad != nullptr) store_within<T>(grad, at, row_length, slopes);
  }
  likelihood.join(&found->inside);
  return likelihood.unfinished().rest;
}

// Weights at the positions of a row, [V, K] flattened, where visits are at risk.
template <typename scalar_t>
class WeightsOfRows {
  using T = accumulator_t<scalar_t>;

 public:
  explicit WeightsOfRows(const WeightedSettings<scalar_t>& settings)
      : settings_(settings), is_a_row_(settings.row_starts == nullptr && settings.classes == 1) {
    if (!is_a_row_) scratch_.resize(settings.slots * settings.classes);
  }

  // As that of row_kernels.h, for of() of that patient.
  EHRSEQ_INLINE void prefetch(int64_t patient, const Outcome& outcome) const {
    if (!is_a_row_) return;
    const T* row = settings_.weights + patient * settings_.row_length;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t at = outcome.entry; at <= outcome.time; at += kLine) __builtin_prefetch(row + at);
  }

  const T* of(int64_t patient, const Outcome& outcome) {
    if (is_a_row_) return settings_.weights + patient * settings_.row_length;
    const int64_t classes = settings_.classes;
    for (int64_t visit = outcome.entry; visit <= outcome.time; ++visit) {
      const T weight = settings_.weights[settings_.weight_at(patient, visit)];
      for (int64_t c = 0; c < classes; ++c) scratch_[visit * classes + c] = weight;
    }
    return scratch_.data();
  }

 private:
  const WeightedSettings<scalar_t>& settings_;
  bool is_a_row_;
  std::vector<T> scratch_;
};

template <typename Likelihood, typename scalar_t>
void weighted_bernoulli_rows(const WeightedSettings<scalar_t>& settings, const Rows<scalar_t>& rows,
                             double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  WeightsOfRows<scalar_t> weights(settings);
  Found<T> found;
  const auto prefetch_patient = [&](int64_t i) __attribute__((always_inline)) {
    if (i >= rows.patients) return;
    prefetch(settings, rows, i);
    weights.prefetch(rows.first + i, rows.outcomes[i]);
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch_patient(i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch_patient(i + kRowsAhead);
    const Outcome& outcome = rows.outcomes[i];
    nll[i] = weighted_nll_of_trials<Likelihood>(
        settings.eps, rows.values + i * row_length,
        rows.grad ? rows.grad + i * row_length : nullptr, row_length, trials_of(outcome, settings),
        weights.of(rows.first + i, outcome), grad_scale<scalar_t>(outcome, settings), &found);
  }
  if (!all_set<T>(~found.negative)) *rows.possible = false;
  if (!all_set<T>(found.inside) && !probabilities_fit(settings, rows)) *rows.possible = false;
}

template <typename scalar_t>
void weighted_softmax_rows(const WeightedSettings<scalar_t>& settings, const Rows<scalar_t>& rows,
                           double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  Softmax<T> softmax(settings.classes);
  Mask<T> negative{};
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    const scalar_t* row = rows.values + i * row_length;
    auto* grad = rows.grad ? rows.grad + i * row_length : nullptr;
    const T scale = grad_scale<scalar_t>(outcome, settings);
    WeightedSum<T> sum;
    const auto add = [&](int64_t visit, int64_t visits,
                         int64_t target) __attribute__((always_inline)) {
      T of_visits[kLanes<T>] = {};
      for (int64_t v = 0; v < visits; ++v) {
        of_visits[v] = settings.weights[settings.weight_at(rows.first + i, visit + v)];
      }
      const Lanes<T> weights = load(of_visits);
      negative |= weights < T(0);
      sum.weigh(weights);
      softmax.add(sum, row, grad, visit, visits, target, scaled(weights, scale));
    };
    for (int64_t visit = outcome.entry; visit < outcome.time; visit += kLanes<T>) {
      add(visit, std::min(kLanes<T>, outcome.time - visit), 0);
    }
    if (outcome.type > 0 || settings.censored_included) add(outcome.time, 1, outcome.type);
    nll[i] = sum.total();
  }
  if (!all_set<T>(~negative)) *rows.possible = false;
}

template <typename scalar_t>
void weighted_rows_nll(const WeightedSettings<scalar_t>& settings, const Rows<scalar_t>& rows,
                       double* nll) {
  using T = accumulator_t<scalar_t>;
  using Sum = WeightedSum<T>;
  switch (settings.link) {
    case Link::kProbabilities:
      return weighted_bernoulli_rows<FromProbabilities<T, Sum>>(settings, rows, nll);
    case Link::kSigmoid:
      return weighted_bernoulli_rows<FromLogits<T, Sum>>(settings, rows, nll);
    case Link::kSoftmax:
      return weighted_softmax_rows(settings, rows, nll);
    case Link::kCloglog:
      return weighted_bernoulli_rows<FromCloglog<T, Sum>>(settings, rows, nll);
  }
}

}  // namespace ehrseq::survival::EHRSEQ_ISA
