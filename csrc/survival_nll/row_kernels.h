// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "survival_nll/likelihood.h"
#include "survival_nll/rows.h"

namespace ehrseq::survival::EHRSEQ_ISA {

inline Trials trials_of(const Outcome& outcome, const Settings& settings) {
  const int64_t time = outcome.time * settings.classes;
  return {outcome.entry * settings.classes, time,
          time + (settings.censored_included ? settings.classes : 0),
          outcome.type > 0 ? time + outcome.type - 1 : -1};
}

template <typename scalar_t>
accumulator_t<scalar_t> grad_scale(const Outcome& outcome, const Settings& settings) {
  return static_cast<accumulator_t<scalar_t>>(outcome.weight * settings.share);
}

// The next rows' visits at risk, on their way from memory while this row is computed: rows are read
// in part only, and so the processor's own prefetcher loses track at each.
constexpr int64_t kRowsAhead = 8;

template <typename scalar_t>
EHRSEQ_INLINE void prefetch(const Settings& settings, const Rows<scalar_t>& rows, int64_t patient) {
  if (patient >= rows.patients) return;
  const Outcome& outcome = rows.outcomes[patient];
  const scalar_t* row = rows.hazards + patient * settings.slots * settings.classes;
  const scalar_t* end = row + (outcome.time + 1) * settings.classes;
  for (row += outcome.entry * settings.classes; row < end; row += 64 / sizeof(scalar_t)) {
    __builtin_prefetch(row);
  }
}

template <template <typename> class Likelihood, typename scalar_t>
void bernoulli_rows(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  Group<Outcomes::kAtOnce> group;
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(settings, rows, i);
  for (int64_t i = 0; i < rows.patients; ++i) {
    prefetch(settings, rows, i + kRowsAhead);
    group.set(i, nll_of_trials<Likelihood<T>>(settings.eps, rows.hazards + i * row_length,
                                              rows.grad ? rows.grad + i * row_length : nullptr,
                                              row_length, trials_of(rows.outcomes[i], settings),
                                              grad_scale<scalar_t>(rows.outcomes[i], settings)));
  }
  group.template finish<Likelihood<T>>(rows.patients, nll);
}

template <typename scalar_t>
void softmax_rows(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  using T = accumulator_t<scalar_t>;
  const int64_t row_length = settings.slots * settings.classes;
  Softmax<T> softmax(settings.classes);
  Group<Outcomes::kAtOnce> group;
  for (int64_t i = 0; i < rows.patients; ++i) {
    const Outcome& outcome = rows.outcomes[i];
    const bool time_counts = outcome.type > 0 || settings.censored_included;
    group.set(i, softmax.nll_of_visits(rows.hazards + i * row_length,
                                       rows.grad ? rows.grad + i * row_length : nullptr,
                                       outcome.entry, outcome.time, time_counts ? outcome.type : -1,
                                       grad_scale<scalar_t>(outcome, settings)));
  }
  group.template finish<FromLogits<T>>(rows.patients, nll);
}

template <typename scalar_t>
void rows_nll(const Settings& settings, const Rows<scalar_t>& rows, double* nll) {
  switch (settings.link) {
    case Link::kProbabilities:
      return bernoulli_rows<FromProbabilities>(settings, rows, nll);
    case Link::kSigmoid:
      return bernoulli_rows<FromLogits>(settings, rows, nll);
    case Link::kSoftmax:
      return softmax_rows(settings, rows, nll);
  }
}

EHRSEQ_INLINE uint64_t load_word(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

using Words = Lanes<uint64_t>;

EHRSEQ_INLINE Words load_words(const uint8_t* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

EHRSEQ_INLINE uint64_t any_bit(const Words& words) {
  return join_lanes<uint64_t>(
      words, [](const auto& a, const auto& b) __attribute__((always_inline)) { return a | b; });
}

EHRSEQ_INLINE int64_t sum_of_bytes(uint64_t word) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  const uint64_t pairs = (word & kEvenBytes) + ((word >> 8) & kEvenBytes);
  return static_cast<int64_t>((pairs * 0x0001000100010001) >> 48);
}

EHRSEQ_INLINE int64_t sum_of_bytes(const Words& words) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff;
  const Words w = (words & kEvenBytes) + ((words >> 8) & kEvenBytes);
  const uint64_t pairs = sum_of_lanes<uint64_t>(w);
  return static_cast<int64_t>((pairs * 0x0001000100010001) >> 48);
}

// Sixty-four bytes a step, then eight (little-endian). A byte is wrong if it is neither 0 nor 1, or
// if it is 0 and the next one is 1. At least eight slots.
EHRSEQ_INLINE int64_t visits_of_bytes(const uint8_t* row, int64_t slots) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  constexpr int64_t kBlock = sizeof(Words);
  constexpr int64_t kMostBlocks = 128;  // so that no byte's sum overflows, the words' included

  int64_t visits = 0;
  int64_t at = 0;
  Words wrong_words{};
  while (at + kBlock < slots) {
    Words sums{};
    const int64_t blocks = std::min((slots - at - 1) / kBlock, kMostBlocks);
    for (int64_t i = 0; i < blocks; ++i, at += kBlock) {
      const Words words = load_words(row + at);
      const Words next = load_words(row + at + 1);
      wrong_words |= (next & ~words) | (words & ~kOnes);
      sums += words;
    }
    visits += sum_of_bytes(sums);
  }
  uint64_t wrong = any_bit(wrong_words);
  uint64_t sum = 0;
  for (; at + 8 < slots; at += 8) {
    const uint64_t word = load_word(row + at);
    const uint64_t next = load_word(row + at + 1);
    wrong |= (next & ~word) | (word & ~kOnes);
    sum += word;
  }
  const uint64_t rest = load_word(row + slots - 8) >> (8 * (8 - (slots - at)));
  wrong |= ((rest >> 8) & ~rest) | (rest & ~kOnes);
  return wrong != 0 ? kMalformed : visits + sum_of_bytes(sum + rest);
}

void count_in_bytes(const uint8_t* mask, int64_t row_stride, int64_t slots, int64_t rows,
                    int64_t* visits) {
  for (int64_t i = 0; i < rows; ++i) visits[i] = visits_of_bytes(mask + i * row_stride, slots);
}

}  // namespace ehrseq::survival::EHRSEQ_ISA
