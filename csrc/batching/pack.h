// From records to one batch in PackedSequence order: time-major, patients by falling length.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "batching/records.h"
#include "batching/transpose.h"

namespace ehrseq::batching {

struct Sizes {
  int64_t patients = 0;
  int64_t max_visits = 0;
  int64_t visits = 0;
  int64_t codes = 0;
  int64_t distinct_codes = 0;
};

// The outcomes of each patient, in the caller's order; null where there are none.
struct OutcomeArrays {
  const int64_t* event_times = nullptr;
  const int64_t* event_indicators = nullptr;
  const int64_t* event_types = nullptr;
};

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<int64_t[], FreeMemory>;

inline Buffer allocate(int64_t longs) {
  auto* memory = static_cast<int64_t*>(std::malloc(std::max<int64_t>(longs, 1) * sizeof(int64_t)));
  if (!memory) throw std::bad_alloc();
  return Buffer(memory);
}

inline Buffer shrink(Buffer buffer, int64_t longs) {
  auto* const memory = std::realloc(buffer.get(), longs * sizeof(int64_t));
  if (!memory) return buffer;  // nothing was freed: the longer buffer is as good
  static_cast<void>(buffer.release());
  return Buffer(static_cast<int64_t*>(memory));
}

// `host` stays on the host: batch_sizes [max_visits], lengths [patients].
// `fields` is all that a device needs, in one piece, so that one copy takes it there:
//   int64  sorted_indices, unsorted_indices, last_rows [patients], row_starts [max_visits + 1],
//          then those of event_times, event_indicators, event_types [patients] that there are;
//   int32  code_offsets [visits + 1], codes [codes], index_visits [codes],
//          index_codes [distinct], index_offsets [distinct + 1], padded to a whole int64.
struct Packed {
  Sizes sizes;
  int64_t host_longs = 0;
  int64_t field_longs = 0;
  Buffer host;
  Buffer fields;
  Buffer source_rows;  // [visits]: each visit's row in the caller's arrays; null unless asked for
};

struct PatientOrder {
  std::vector<int64_t> sorted;       // the patient at each rank
  std::vector<int64_t> unsorted;     // the rank of each patient
  std::vector<int64_t> batch_sizes;  // how many patients have a visit t
  std::vector<int64_t> row_starts;   // the row of the longest patient's visit t
};

// Stable counting sort by falling length. Its histogram, summed from the longest down, is both
// the rank of the first patient of each length and the number of patients with a visit t.
template <typename Records>
PatientOrder sort_patients_by_length(const Records& records) {
  const int64_t n = records.n_patients();
  int64_t max_visits = 0;
  for (int64_t patient = 0; patient < n; ++patient)
    max_visits = std::max(max_visits, records.length(patient));

  std::vector<int64_t> longer(max_visits + 1, 0);  // patients with more than t visits
  for (int64_t patient = 0; patient < n; ++patient) ++longer[records.length(patient) - 1];
  for (int64_t t = max_visits - 1; t >= 0; --t) longer[t] += longer[t + 1];

  PatientOrder order;
  order.batch_sizes.assign(longer.begin(), longer.end() - 1);
  order.row_starts.resize(max_visits + 1, 0);
  std::partial_sum(order.batch_sizes.begin(), order.batch_sizes.end(),
                   order.row_starts.begin() + 1);

  auto& next_rank = longer;
  order.sorted.resize(n);
  order.unsorted.resize(n);
  for (int64_t patient = 0; patient < n; ++patient) {
    const int64_t rank = next_rank[records.length(patient)]++;
    order.sorted[rank] = patient;
    order.unsorted[patient] = rank;
  }
  return order;
}

template <typename Records>
Sizes measure(const Records& records, const PatientOrder& order) {
  Sizes sizes;
  sizes.patients = records.n_patients();
  sizes.max_visits = static_cast<int64_t>(order.batch_sizes.size());
  sizes.visits = order.row_starts.back();
  if (sizes.visits > kMostEntries) refuse_visit_count(kMostEntries);
  constexpr int64_t kMostCounted = std::numeric_limits<int64_t>::max();
  for (int64_t patient = 0; patient < sizes.patients; ++patient) {
    const int64_t codes = records.count_codes(patient);
    sizes.codes = codes > kMostCounted - sizes.codes ? kMostCounted : sizes.codes + codes;
  }
  if (sizes.codes > kMostEntries)
    refuse_value("A batch holds at most " + text(kMostEntries) +
                 " codes and as many visits; this one has " + text(sizes.codes) + " codes and " +
                 text(sizes.visits) + " visits.");
  return sizes;
}

template <typename Records>
void check_outcomes(const Records& records, const OutcomeArrays& outcomes) {
  Offenders late, unclear, negative;
  for (int64_t patient = 0; patient < records.n_patients(); ++patient) {
    if (outcomes.event_times) {
      const int64_t time = outcomes.event_times[patient];
      if (time < 0 || time >= records.length(patient)) late.add(patient);
    }
    if (outcomes.event_indicators) {
      const int64_t indicator = outcomes.event_indicators[patient];
      if (indicator != 0 && indicator != 1) unclear.add(patient);
    }
    if (outcomes.event_types && outcomes.event_types[patient] < 0) negative.add(patient);
  }
  if (late)
    refuse_value("Found " + text(late.count) +
                 " event times outside their patient's visits: expected 0 <= event_time < length. "
                 "The first is " +
                 text(outcomes.event_times[late.patient]) + ": " + records.name(late.patient) +
                 ", with " + text(records.length(late.patient)) + " visits.");
  if (unclear)
    refuse_value(
        "Found " + text(unclear.count) +
        " event indicators that are neither 0 (censored) nor 1 (event seen). The first is " +
        text(outcomes.event_indicators[unclear.patient]) + ": " + records.name(unclear.patient) +
        ".");
  if (negative)
    refuse_value("Found " + text(negative.count) +
                 " negative event types: expected 0 (censored), 1, 2, ... The first is " +
                 text(outcomes.event_types[negative.patient]) + ": " +
                 records.name(negative.patient) + ".");
}

inline Buffer write_host(const Sizes& sizes, const PatientOrder& order,
                         const std::vector<int64_t>& lengths) {
  Buffer host = allocate(sizes.max_visits + sizes.patients);
  std::copy(order.batch_sizes.begin(), order.batch_sizes.end(), host.get());
  std::copy(lengths.begin(), lengths.end(), host.get() + sizes.max_visits);
  return host;
}

// Writes the int64 fields and returns where they end.
inline int64_t* write_patients(const Sizes& sizes, const PatientOrder& order,
                               const std::vector<int64_t>& lengths, const OutcomeArrays& outcomes,
                               int64_t* to) {
  to = std::copy(order.sorted.begin(), order.sorted.end(), to);
  to = std::copy(order.unsorted.begin(), order.unsorted.end(), to);
  for (int64_t patient = 0; patient < sizes.patients; ++patient)
    *to++ = order.row_starts[lengths[patient] - 1] + order.unsorted[patient];
  to = std::copy(order.row_starts.begin(), order.row_starts.end(), to);
  for (const int64_t* outcome :
       {outcomes.event_times, outcomes.event_indicators, outcomes.event_types})
    if (outcome) to = std::copy(outcome, outcome + sizes.patients, to);
  return to;
}

// Visits of one time step are side by side, the longest patient's first. Returns how many codes
// were written.
template <typename Records>
int64_t copy_codes(const Records& records, const PatientOrder& order, const Vocabulary& vocabulary,
                   int32_t* code_offsets, int32_t* codes) {
  bool all_inside = true;
  int32_t* to = codes;
  for (size_t t = 0; t < order.batch_sizes.size(); ++t) {
    for (int64_t rank = 0; rank < order.batch_sizes[t]; ++rank) {
      *code_offsets++ = static_cast<int32_t>(to - codes);
      to = records.copy_visit(order.sorted[rank], t, to, vocabulary, all_inside);
    }
  }
  *code_offsets = static_cast<int32_t>(to - codes);
  if (!all_inside) records.refuse_codes_outside(vocabulary);
  return to - codes;
}

template <typename Records>
Buffer list_source_rows(const Records& records, const PatientOrder& order) {
  Buffer rows = allocate(order.row_starts.back());
  int64_t* to = rows.get();
  for (size_t t = 0; t < order.batch_sizes.size(); ++t)
    for (int64_t rank = 0; rank < order.batch_sizes[t]; ++rank)
      *to++ = records.source_row(order.sorted[rank], t);
  return rows;
}

template <typename Records>
Packed pack(const Records& records, const Vocabulary& vocabulary, const OutcomeArrays& outcomes,
            bool with_source_rows) {
  check_outcomes(records, outcomes);
  const PatientOrder order = sort_patients_by_length(records);
  Packed packed;
  Sizes& sizes = packed.sizes = measure(records, order);
  std::vector<int64_t> lengths(sizes.patients);
  for (int64_t patient = 0; patient < sizes.patients; ++patient)
    lengths[patient] = records.length(patient);

  packed.host_longs = sizes.max_visits + sizes.patients;
  packed.host = write_host(sizes, order, lengths);

  // How many codes are distinct is known last, so space for as many as there could be is allocated,
  // and what is left over is freed.
  const int64_t most_distinct = std::min(sizes.codes, vocabulary.size);
  const int64_t most_longs = 6 * sizes.patients + sizes.max_visits + 1;
  const int64_t most_ints = sizes.visits + 2 * sizes.codes + 2 * most_distinct + 3;
  packed.fields = allocate(most_longs + (most_ints + 1) / 2);
  int64_t* longs = packed.fields.get();
  int64_t* const end_of_longs = write_patients(sizes, order, lengths, outcomes, longs);

  auto* const code_offsets = reinterpret_cast<int32_t*>(end_of_longs);
  int32_t* const codes = code_offsets + sizes.visits + 1;
  sizes.codes = copy_codes(records, order, vocabulary, code_offsets, codes);
  int32_t* const index_visits = codes + sizes.codes;
  const CodeSegments index =
      transpose({codes, code_offsets, sizes.visits, sizes.codes}, index_visits);
  sizes.distinct_codes = static_cast<int64_t>(index.codes.size());
  int32_t* end = index_visits + sizes.codes;
  end = std::copy(index.codes.begin(), index.codes.end(), end);
  end = std::copy(index.offsets.begin(), index.offsets.end(), end);
  if ((end - code_offsets) % 2 != 0) *end++ = 0;

  packed.field_longs = (end_of_longs - longs) + (end - code_offsets) / 2;
  packed.fields = shrink(std::move(packed.fields), packed.field_longs);
  if (with_source_rows) packed.source_rows = list_source_rows(records, order);
  return packed;
}

}  // namespace ehrseq::batching
