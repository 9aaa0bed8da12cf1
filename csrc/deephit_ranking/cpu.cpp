// deephit_ranking on the CPU, of padded logits and of packed ones: loss and gradient in one call.
// The loops over a row are in row_kernels.h.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/operators.h"
#include "common/options.h"
#include "common/parallel.h"
#include "common/survival/arguments.h"
#include "common/survival/groups.h"
#include "common/survival/outcomes.h"
#include "common/survival/rank_layout.h"
#include "common/survival/transposed_visits.h"
#include "common/tensors.h"
#include "deephit_ranking/rows.h"

namespace ehrseq::survival::ranking {
namespace {

constexpr int64_t kGroup = OutcomeReader::kAtOnce;

// body(first, count, memory) for all groups of patients, each with working memory of its thread.
template <typename T, typename Body>
void for_each_group(const Settings& settings, const Body& body) {
  constexpr int64_t kWorthAThread = 8192;  // values
  const int64_t groups = (settings.patients + kGroup - 1) / kGroup;
  const int64_t values = std::max<int64_t>(1, kGroup * settings.stride());
  parallel_for(0, groups, std::max<int64_t>(1, kWorthAThread / values),
               [&](int64_t begin, int64_t end) {
                 const KeepDenormals denormals;
                 std::vector<T> memory;
                 for (int64_t group = begin; group < end; ++group) {
                   const int64_t first = group * kGroup;
                   body(first, std::min(kGroup, settings.patients - first), memory);
                 }
               });
}

// Whether a patient's softmax takes no more memory than what it was computed of.
template <typename scalar_t>
constexpr bool kKeepsMass = std::is_same_v<scalar_t, accumulator_t<scalar_t>>;

// Patients whose visits are rows of a padded tensor.
template <typename scalar_t>
class PaddedVisits {
 public:
  using grad_t = saved_grad_t<scalar_t>;

  // `grad` is null where none is needed. Until it is written it holds what mass() is for.
  PaddedVisits(const Settings& settings, const scalar_t* logits, grad_t* grad)
      : row_length_(settings.slots * settings.classes),
        classes_(settings.classes),
        logits_(logits),
        grad_(grad) {}

  const scalar_t* row(int64_t patient) const { return logits_ + patient * row_length_; }

  // Where a patient's softmax is kept; null where it is not.
  accumulator_t<scalar_t>* mass(int64_t patient) {
    if constexpr (kKeepsMass<scalar_t>) {
      if (grad_ != nullptr) return grad_ + patient * row_length_;
    }
    return nullptr;
  }

  class Writer {
   public:
    Writer(const PaddedVisits& all, grad_t* grad) : all_(all), grad_(grad) {}
    int64_t patient(int64_t number) const { return number; }
    grad_t* row(int64_t number) const { return grad_ + number * all_.row_length_; }
    void begin(int64_t first, int64_t count, const Outcome* outcomes) {
      if (!kKeepsMass<scalar_t>) {
        std::fill_n(row(first), count * all_.row_length_, grad_t(0));
        return;
      }
      for (int64_t i = 0; i < count; ++i) {
        grad_t* of_patient = row(first + i);
        std::fill_n(of_patient, outcomes[i].entry * all_.classes_, grad_t(0));
        std::fill(of_patient + outcomes[i].visits * all_.classes_, of_patient + all_.row_length_,
                  grad_t(0));
      }
    }
    void end(int64_t, int64_t) {}

   private:
    const PaddedVisits& all_;
    grad_t* grad_;
  };

 private:
  int64_t row_length_;
  int64_t classes_;
  const scalar_t* logits_;
  grad_t* grad_;
};

// Patients whose visits are rows of a packed batch. They are copied, patient after patient, as sums
// over patients are in the caller's order: so the results are those of the padded layout.
template <typename scalar_t>
class RankedVisits {
 public:
  using grad_t = saved_grad_t<scalar_t>;

  RankedVisits(const Settings& settings, const RankLayout& layout, const scalar_t* logits)
      : layout_(layout), classes_(settings.classes), starts_(layout.patients()) {
    int64_t values = 0;
    for (int64_t patient = 0; patient < layout.patients(); ++patient) {
      starts_[patient] = values;
      values += layout.lengths()[patient] * classes_;
    }
    values_.resize(values);
    for_each_group<char>(settings, [&](int64_t first, int64_t count, std::vector<char>&) {
      scalar_t* rows[kGroup];
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = values_.data() + starts_[layout.patient_of_rank(first + i)];
      }
      copy_visits(first, count, [&](int64_t i, int64_t visit, int64_t row) {
        std::copy_n(logits + row * classes_, classes_, rows[i] + visit * classes_);
      });
    });
  }

  const scalar_t* row(int64_t patient) const { return values_.data() + starts_[patient]; }

  // In place of the copy.
  accumulator_t<scalar_t>* mass(int64_t patient) {
    if constexpr (kKeepsMass<scalar_t>) {
      return values_.data() + starts_[patient];
    } else {
      return nullptr;
    }
  }

  class Writer {
   public:
    Writer(const RankedVisits& all, grad_t* grad) : all_(all), grad_(grad) {}
    int64_t patient(int64_t rank) const { return all_.layout_.patient_of_rank(rank); }
    grad_t* row(int64_t rank) { return rows_.data() + (rank - first_) * length_; }
    void begin(int64_t first, int64_t count, const Outcome*) {
      first_ = first;
      // the first ranks have the most visits
      length_ = all_.layout_.lengths()[patient(first)] * all_.classes_;
      rows_.assign(count * length_, grad_t(0));
    }
    void end(int64_t first, int64_t count) {
      const int64_t classes = all_.classes_;
      all_.copy_visits(first, count, [&](int64_t i, int64_t visit, int64_t row) {
        std::copy_n(rows_.data() + i * length_ + visit * classes, classes, grad_ + row * classes);
      });
    }

   private:
    const RankedVisits& all_;
    grad_t* grad_;
    int64_t first_ = 0;
    int64_t length_ = 0;
    std::vector<grad_t> rows_;
  };

 private:
  // copy(i, visit, row) for the visits of ranks first + i.
  template <typename Copy>
  void copy_visits(int64_t first, int64_t count, const Copy& copy) const {
    for (int64_t visit = 0; visit < layout_.most_visits(); ++visit) {
      const int64_t present = std::min(layout_.ranks_at(visit) - first, count);
      if (present <= 0) return;  // nor is there one at any later time
      const int64_t row = layout_.row(first, visit);
      for (int64_t i = 0; i < present; ++i) copy(i, visit, row + i);
    }
  }

  const RankLayout& layout_;
  int64_t classes_;
  std::vector<int64_t> starts_;
  std::vector<scalar_t> values_;
};

// The sums over all pairs, by visit and cause.
template <typename T>
struct Sums {
  std::vector<T> largest;
  std::vector<double> of_later;
  std::vector<double> of_events;
  std::vector<double> own;  // of each patient: its exponent, then what it adds to of_events

  Sums(int64_t stride, int64_t patients)
      : largest(stride), of_later(stride), of_events(stride), own(patients) {}
};

template <typename scalar_t, typename Visits>
void sum_pairs(const Settings& settings, Visits& visits, const OutcomeReader& reader,
               std::vector<Outcome>& outcomes, Sums<accumulator_t<scalar_t>>& sums) {
  using T = accumulator_t<scalar_t>;
  const int64_t stride = settings.stride();
  const int64_t groups = (settings.patients + kGroup - 1) / kGroup;
  std::vector<T> largest(groups * stride);
  std::vector<double> of_later(groups * stride);
  std::atomic<bool> possible{true};
  for_each_group<T>(settings, [&](int64_t first, int64_t count, std::vector<T>& memory) {
    if (!reader.read(first, first + count, outcomes.data() + first)) {
      possible.store(false, std::memory_order_relaxed);
      return;
    }
    Rows<scalar_t> rows{{}, outcomes.data() + first, count};
    for (int64_t i = 0; i < count; ++i) {
      rows.logits[i] = visits.row(first + i);
      rows.mass[i] = visits.mass(first + i);
    }
    const int64_t at = first / kGroup * stride;
    sum_later(settings, rows, Later<T>{largest.data() + at, of_later.data() + at},
              sums.own.data() + first, memory);
  });
  if (!possible.load()) reader.refuse();
  const KeepDenormals denormals;
  join_later(groups, stride, Later<T>{largest.data(), of_later.data()},
             Later<T>{sums.largest.data(), sums.of_later.data()});
  std::vector<double> factors(settings.patients);  // e^(largest - own)
  const auto exponent_of = [&](int64_t i) {
    const int64_t at = event_of(outcomes[i], settings);
    return static_cast<double>(sums.largest[at]) - sums.own[i];
  };
  for (int64_t i = 0; i < settings.patients; ++i) {
    if (outcomes[i].type > 0) factors[i] = exponent_of(i);
  }
  exponentiate(factors.data(), settings.patients);
  for (int64_t i = 0; i < settings.patients; ++i) {
    const Outcome& outcome = outcomes[i];
    if (outcome.type == 0) continue;
    // a weight of 0 leaves the event out, but for a NaN
    sums.own[i] = outcome.weight == 0 ? exponent_of(i) * 0 : outcome.weight * factors[i];
    sums.of_events[event_of(outcome, settings)] += sums.own[i];
  }
}

template <typename scalar_t, typename Visits>
void write_all(const Settings& settings, Visits& visits, const std::vector<Outcome>& outcomes,
               Sums<accumulator_t<scalar_t>>& sums, saved_grad_t<scalar_t>* grad) {
  using T = accumulator_t<scalar_t>;
  const double patients = static_cast<double>(settings.patients);
  const double share = 1 / (patients * patients) / settings.sigma;
  std::vector<T> of_events(settings.stride());
  for (size_t at = 0; at < of_events.size(); ++at) {
    of_events[at] = static_cast<T>(sums.of_events[at] * share);
  }
  for (int64_t i = 0; i < settings.patients; ++i) {
    const Outcome& outcome = outcomes[i];
    if (outcome.type == 0) continue;
    sums.own[i] *= sums.of_later[event_of(outcome, settings)] * share;
  }
  for_each_group<T>(settings, [&](int64_t first, int64_t count, std::vector<T>& memory) {
    typename Visits::Writer writer(visits, grad);
    Outcome of_rows[kGroup];
    double own[kGroup];
    saved_grad_t<scalar_t>* grads[kGroup];
    Rows<scalar_t> rows{{}, of_rows, count};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t patient = writer.patient(first + i);
      of_rows[i] = outcomes[patient];
      own[i] = sums.own[patient];
      rows.logits[i] = visits.row(patient);
      rows.mass[i] = visits.mass(patient);
    }
    writer.begin(first, count, of_rows);
    for (int64_t i = 0; i < count; ++i) grads[i] = writer.row(first + i);
    write_gradients(settings, rows, Slopes<T>{sums.largest.data(), of_events.data(), own}, grads,
                    memory);
    writer.end(first, count);
  });
}

template <typename scalar_t, typename Visits>
std::tuple<Tensor, Tensor> loss_and_grad(const Settings& settings, const Tensor& grad,
                                         Visits& visits, const OutcomeReader& reader,
                                         bool needs_grad) {
  using T = accumulator_t<scalar_t>;
  const Tensor loss = allocated(grad, {}, kDtypeOf<T>);
  if (settings.patients == 0) {
    *data<T>(loss) = std::numeric_limits<T>::quiet_NaN();
    return {loss, grad};
  }
  std::vector<Outcome> outcomes(settings.patients);
  Sums<T> sums(settings.stride(), settings.patients);
  sum_pairs<scalar_t>(settings, visits, reader, outcomes, sums);
  double total = 0;
  for (size_t at = 0; at < sums.of_later.size(); ++at) {
    total += sums.of_later[at] * sums.of_events[at];
  }
  const double patients = static_cast<double>(settings.patients);
  *data<T>(loss) = static_cast<T>(total / (patients * patients));
  if (needs_grad) {
    write_all<scalar_t>(settings, visits, outcomes, sums, data<saved_grad_t<scalar_t>>(grad));
  }
  return {loss, grad};
}

std::tuple<Tensor, Tensor> deephit_ranking(Tensor logits, Tensor event_times, Tensor event_types,
                                           OptionalTensor sequence_mask, OptionalTensor row_starts,
                                           OptionalTensor unsorted_indices,
                                           OptionalTensor last_rows, OptionalTensor entry_times,
                                           OptionalTensor sample_weight, bool competing,
                                           bool censored_included, double sigma, bool needs_grad) {
  constexpr const char* kName = "deephit_ranking";
  expect_on_cpu(kName, logits, event_times, event_types, sequence_mask, row_starts,
                unsorted_indices, last_rows, entry_times, sample_weight);
  const LogitsShape shape =
      expect_logits(kName, competing, logits, event_times, event_types, sequence_mask, row_starts,
                    unsorted_indices, last_rows, entry_times, sample_weight);
  if (!(sigma > 0 && std::isfinite(sigma))) {
    refuse(kName, "sigma", "a finite number above 0", std::to_string(sigma));
  }
  std::optional<RankLayout> layout;
  if (shape.packed) {
    layout.emplace(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
  }
  const Settings settings{shape.patients, shape.slots, shape.classes, censored_included, sigma};
  const OutcomeReader reader(
      shape.patients, layout ? VisitMask(layout->lengths()) : VisitMask(sequence_mask, shape.slots),
      shape.classes, name_of_types(competing), event_times, event_types, entry_times,
      sample_weight);

  const Tensor rows = made_contiguous(logits);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    const auto* values = data<const scalar_t>(rows);
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    if (layout) {
      RankedVisits<scalar_t> visits(settings, *layout, values);
      result = loss_and_grad<scalar_t>(settings, grad, visits, reader, needs_grad);
    } else {
      auto* grads = needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr;
      PaddedVisits<scalar_t> visits(settings, values, grads);
      result = loss_and_grad<scalar_t>(settings, grad, visits, reader, needs_grad);
    }
  });
  return result;
}

}  // namespace
}  // namespace ehrseq::survival::ranking

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("deephit_ranking", EHRSEQ_BOX(&ehrseq::survival::ranking::deephit_ranking));
}
