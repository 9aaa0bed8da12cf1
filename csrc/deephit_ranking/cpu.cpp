// deephit_ranking on the CPU, of padded logits and of packed ones: loss and gradient in one call.
// The loops over a row are in row_kernels.h.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
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
        if (outcomes[i].entry > 0) {
          std::fill_n(of_patient, outcomes[i].entry * all_.classes_, grad_t(0));
        }
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
  std::vector<double> own;      // of each patient: what it adds to of_events; 0 without an event
  std::vector<int64_t> events;  // and where; 0 without one

  Sums(int64_t stride, int64_t patients)
      : largest(stride), of_later(stride), of_events(stride), own(patients), events(patients) {}
};

// What is kept of the first loop over patients for the second.
template <typename T>
struct Kept {
  std::vector<double> shares;
  std::unique_ptr<T[]> terms;
  std::vector<int64_t> terms_at;  // of each patient

  Kept(const Settings& settings, bool keeps_mass) {
    if (!keeps_mass) return;
    shares.resize(settings.patients);
    if (!settings.knows_largest()) return;
    terms_at.resize(settings.patients);
    // not set to 0: of most rows much is never used
    terms.reset(new T[settings.patients * row_of_terms(settings)]);
  }

  // Where the terms of patients first..first + count are.
  void place(int64_t first, int64_t count, const Outcome* outcomes, const Settings& settings) {
    if (terms == nullptr) return;
    int64_t at = first * row_of_terms(settings);
    for (int64_t i = 0; i < count; ++i) {
      terms_at[first + i] = at;
      at += room_for_terms(outcomes[i], settings);
    }
  }

  T* terms_of(int64_t patient) {
    return terms != nullptr ? terms.get() + terms_at[patient] : nullptr;
  }

 private:
  static int64_t row_of_terms(const Settings& settings) {
    const Outcome longest{0, settings.slots - 1, 0, 1.0, settings.slots};
    return room_for_terms(longest, settings);
  }
};

// own[i] becomes what the event of patient i adds to the sums over events.
template <typename T>
void weigh_events(const Settings& settings, const Outcome* outcomes, int64_t count,
                  const T* largest, double* own, int64_t* events) {
  double exponents[kGroup] = {};  // largest - own
  for (int64_t i = 0; i < count; ++i) {
    events[i] = outcomes[i].type > 0 ? event_of(outcomes[i], settings) : 0;
    if (outcomes[i].type > 0) exponents[i] = static_cast<double>(largest[events[i]]) - own[i];
  }
  double factors[kGroup];
  std::copy(exponents, exponents + count, factors);
  exponentiate(factors, count);
  for (int64_t i = 0; i < count; ++i) {
    const double weight = outcomes[i].weight;
    // a weight of 0 leaves the event out, but for a NaN
    const double weighted = weight == 0 ? exponents[i] * 0 : weight * factors[i];
    own[i] = outcomes[i].type > 0 ? weighted : 0.0;
  }
}

template <typename scalar_t, typename Visits>
void sum_pairs(const Settings& settings, Visits& visits, const OutcomeReader& reader,
               std::vector<Outcome>& outcomes, Sums<accumulator_t<scalar_t>>& sums,
               Kept<accumulator_t<scalar_t>>& kept) {
  using T = accumulator_t<scalar_t>;
  const int64_t stride = settings.stride();
  const int64_t groups = (settings.patients + kGroup - 1) / kGroup;
  const bool knows_largest = settings.knows_largest();
  if (knows_largest) std::fill(sums.largest.begin(), sums.largest.end(), settings.largest<T>());
  std::vector<T> largest(knows_largest ? 0 : groups * stride);
  const std::unique_ptr<double[]> of_later(new double[groups * stride]);
  std::atomic<bool> possible{true};
  for_each_group<T>(settings, [&](int64_t first, int64_t count, std::vector<T>& memory) {
    Outcome* of_group = outcomes.data() + first;
    if (!reader.read(first, first + count, of_group)) {
      possible.store(false, std::memory_order_relaxed);
      return;
    }
    kept.place(first, count, of_group, settings);
    Rows<scalar_t> rows{{}, of_group, count};
    for (int64_t i = 0; i < count; ++i) {
      rows.logits[i] = visits.row(first + i);
      rows.mass[i] = visits.mass(first + i);
      rows.terms[i] = kept.terms_of(first + i);
    }
    if (!kept.shares.empty()) rows.shares = kept.shares.data() + first;
    const int64_t at = first / kGroup * stride;
    T* most = knows_largest ? sums.largest.data() : largest.data() + at;
    double* own = sums.own.data() + first;
    sum_later(settings, rows, Later<T>{most, of_later.get() + at}, own, memory);
    if (!knows_largest) return;
    weigh_events(settings, of_group, count, most, own, sums.events.data() + first);
  });
  if (!possible.load()) reader.refuse();
  const KeepDenormals denormals;
  if (knows_largest) {
    for (int64_t group = 0; group < groups; ++group) {
      const double* of_group = of_later.get() + group * stride;
      for (int64_t at = 0; at < stride; ++at) sums.of_later[at] += of_group[at];
    }
  } else {
    join_later(groups, stride, Later<T>{largest.data(), of_later.get()},
               Later<T>{sums.largest.data(), sums.of_later.data()});
    for (int64_t first = 0; first < settings.patients; first += kGroup) {
      weigh_events(settings, outcomes.data() + first, std::min(kGroup, settings.patients - first),
                   sums.largest.data(), sums.own.data() + first, sums.events.data() + first);
    }
  }
  for (int64_t i = 0; i < settings.patients; ++i) sums.of_events[sums.events[i]] += sums.own[i];
}

template <typename scalar_t, typename Visits>
void write_all(const Settings& settings, Visits& visits, const std::vector<Outcome>& outcomes,
               const Sums<accumulator_t<scalar_t>>& sums, Kept<accumulator_t<scalar_t>>& kept,
               saved_grad_t<scalar_t>* grad) {
  using T = accumulator_t<scalar_t>;
  const double patients = static_cast<double>(settings.patients);
  const double share = 1 / (patients * patients) / settings.sigma;
  std::vector<T> of_events(settings.stride());
  for (size_t at = 0; at < of_events.size(); ++at) {
    of_events[at] = static_cast<T>(sums.of_events[at] * share);
  }
  for_each_group<T>(settings, [&](int64_t first, int64_t count, std::vector<T>& memory) {
    typename Visits::Writer writer(visits, grad);
    Outcome of_rows[kGroup];
    double own[kGroup];
    double shares[kGroup];
    saved_grad_t<scalar_t>* grads[kGroup];
    Rows<scalar_t> rows{{}, of_rows, count};
    for (int64_t i = 0; i < count; ++i) {
      const int64_t patient = writer.patient(first + i);
      of_rows[i] = outcomes[patient];
      own[i] = sums.own[patient] * (sums.of_later[sums.events[patient]] * share);
      rows.logits[i] = visits.row(patient);
      rows.mass[i] = visits.mass(patient);
      rows.terms[i] = kept.terms_of(patient);
      if (!kept.shares.empty()) shares[i] = kept.shares[patient];
    }
    rows.shares = shares;
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
  Kept<T> kept(settings, kKeepsMass<scalar_t> && needs_grad);
  sum_pairs<scalar_t>(settings, visits, reader, outcomes, sums, kept);
  double total = 0;
  for (size_t at = 0; at < sums.of_later.size(); ++at) {
    total += sums.of_later[at] * sums.of_events[at];
  }
  const double patients = static_cast<double>(settings.patients);
  *data<T>(loss) = static_cast<T>(total / (patients * patients));
  if (needs_grad) {
    write_all<scalar_t>(settings, visits, outcomes, sums, kept, data<saved_grad_t<scalar_t>>(grad));
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
