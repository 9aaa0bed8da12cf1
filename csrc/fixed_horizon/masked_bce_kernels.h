// Binary cross-entropy with labels and weights that are given. Logits and labels are read where a
// weight is not 0.
//
// Compiled once for each instruction set, hence no include guard: see common/each_isa.h.

#include "common/set_bits.h"
#include "fixed_horizon/masked_bce.h"
#include "survival_nll/sums.h"
// after those
#include "fixed_horizon/terms.h"

namespace ehrseq::fixed_horizon::EHRSEQ_ISA {

constexpr int64_t kBlocksAhead = 16;

EHRSEQ_INLINE uint64_t bits_where(const Mask<double>& mask) {
#if EHRSEQ_ISA_LEVEL >= 2
  return _mm512_movepi64_mask((__m512i)mask);
#elif EHRSEQ_ISA_LEVEL == 1
  return static_cast<uint64_t>(_mm256_movemask_pd((__m256d)mask));
#else
  return (mask[0] & 1) | (mask[1] & 2);
#endif
}

// Of integers, those that have any of these bits.
EHRSEQ_INLINE uint64_t bits_where_any(const Mask<double>& integers, int64_t bits) {
#if EHRSEQ_ISA_LEVEL >= 2
  return _mm512_test_epi64_mask((__m512i)integers, _mm512_set1_epi64(bits));
#else
  return bits_where((integers & bits) != 0);
#endif
}

template <typename T>
EHRSEQ_INLINE Mask<T> lanes_of_bits(uint64_t bits) {
  const Mask<T> of_lane = broadcast<bits_t<T>>(1) << lane_numbers<T>();
  return (broadcast(static_cast<bits_t<T>>(bits)) & of_lane) != 0;
}

template <typename T>
constexpr uint64_t kAllLanes = (uint64_t{1} << kLanes<T>)-1;

EHRSEQ_INLINE Doubles load_doubles(const double* from) { return load(from); }
EHRSEQ_INLINE Doubles load_doubles(const float* from) {
  return __builtin_convertvector(load_exactly<kLanes<double>>(from), Doubles);
}
EHRSEQ_INLINE Doubles load_doubles(const int64_t* from) {
  return __builtin_convertvector(load_exactly<kLanes<double>>(from), Doubles);
}

// Calls block(from, number) for whole blocks; the last slots are in one that zeros fill up.
template <typename stored_t, typename Body>
EHRSEQ_INLINE void for_each_block(const void* data, int64_t slots, Body&& body) {
  const auto* from = static_cast<const stored_t*>(data);
  const int64_t whole = slots / kBlockSlots;
  for (int64_t i = 0; i < whole; ++i) body(from + i * kBlockSlots, i);
  if (whole * kBlockSlots == slots) return;
  stored_t some[kBlockSlots] = {};
  std::memcpy(some, from + whole * kBlockSlots, (slots - whole * kBlockSlots) * sizeof(stored_t));
  body(some, whole);
}

template <typename stored_t>
double read_weights_stored_as(const void* data, int64_t slots, uint64_t* words, bool* possible) {
  Doubles sums{};
  Mask<double> negative{};
  for_each_block<stored_t>(data, slots,
                           [&](const stored_t* from, int64_t block) __attribute__((always_inline)) {
                             for (int64_t at = 0; at < kBlockSlots; at += kLanes<double>) {
                               const Doubles weight = load_doubles(from + at);
                               negative |= weight < 0.0;
                               sums += weight;  // a NaN or an infinity reaches the result
                             }
                             words[block] = set_of_64(from);
                           });
  if (any_lane<double>(negative)) *possible = false;
  return sum_of_lanes<double>(sums);
}

inline double read_weights(const Numbers& weights, int64_t slots, uint64_t* words, bool* possible) {
  switch (weights.stored) {
    case Stored::kLong:
      return read_weights_stored_as<int64_t>(weights.data, slots, words, possible);
    case Stored::kFloat:
      return read_weights_stored_as<float>(weights.data, slots, words, possible);
    case Stored::kDouble:
      return read_weights_stored_as<double>(weights.data, slots, words, possible);
    case Stored::kBool:
      break;
  }
  int64_t count = 0;
  for_each_block<uint8_t>(weights.data, slots,
                          [&](const uint8_t* from, int64_t block) __attribute__((always_inline)) {
                            words[block] = set_of_64(from);
                            count += __builtin_popcountll(words[block]);
                          });
  return static_cast<double>(count);
}

EHRSEQ_INLINE int64_t bytes_of(Stored stored) {
  return stored == Stored::kBool ? 1 : stored == Stored::kFloat ? 4 : 8;
}

EHRSEQ_INLINE const char* slot_of(const Numbers& numbers, int64_t slot) {
  return static_cast<const char*>(numbers.data) + slot * bytes_of(numbers.stored);
}

// One slot or more of 64 that begin at `from`, of so many bytes each, where bits are set.
EHRSEQ_INLINE void prefetch_where(uint64_t bits, const void* from, int64_t bytes) {
  const int64_t slots = 64 / bytes;
  const uint64_t of_line = slots == 64 ? ~uint64_t{0} : (uint64_t{1} << slots) - 1;
  const auto* line = static_cast<const char*>(from);
  for (; bits != 0; bits = slots == 64 ? 0 : bits >> slots, line += 64) {
    if (bits & of_line) __builtin_prefetch(line);
  }
}

// A block's labels. They are read as bits where each that counts is 0 or 1.
class LabelsOfBlock {
 public:
  EHRSEQ_INLINE LabelsOfBlock(const Numbers& labels, int64_t slot, uint64_t word)
      : stored_(labels.stored), from_(slot_of(labels, slot)) {
    switch (stored_) {
      case Stored::kBool:
        ones_ = set_of_64(reinterpret_cast<const uint8_t*>(from_));
        break;
      case Stored::kLong:
        read_integers(reinterpret_cast<const int64_t*>(from_), word);
        break;
      case Stored::kFloat:
        read_numbers(reinterpret_cast<const float*>(from_), word);
        break;
      case Stored::kDouble:
        read_numbers(reinterpret_cast<const double*>(from_), word);
        break;
    }
    others_ &= word;
  }

  // Whether a label of a slot that counts is an integer other than 0 and 1.
  EHRSEQ_INLINE bool are_wrong() const { return stored_ == Stored::kLong && others_ != 0; }

  EHRSEQ_INLINE bool are_bits() const { return stored_ == Stored::kLong || others_ == 0; }

  template <typename T>
  EHRSEQ_INLINE Mask<T> ones(int64_t at) const {
    return lanes_of_bits<T>(ones_ >> at);
  }

  // Those that count, and 0 for the others.
  template <typename T>
  EHRSEQ_INLINE Lanes<T> at(int64_t at, uint64_t bits, Mask<double>* wrong) const {
    if (are_bits()) {
      return only_where<T>(lanes_of_bits<T>((ones_ >> at) & bits), broadcast(T(1)));
    }
    Wide<T> label;
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      const int64_t first = i * kLanes<double>;
      const Mask<double> counts = lanes_of_bits<double>(bits >> first);
      const Doubles given = stored_ == Stored::kFloat
                                ? load_doubles(reinterpret_cast<const float*>(from_) + at + first)
                                : load_doubles(reinterpret_cast<const double*>(from_) + at + first);
      const Mask<double> fits = (given >= 0.0) & (given <= 1.0);
      *wrong |= counts & ~fits;
      label.part[i] = only_where<double>(counts, given);
    }
    return narrow(label);
  }

 private:
  EHRSEQ_INLINE void read_integers(const int64_t* from, uint64_t word) {
    for (int64_t at = 0; at < kBlockSlots; at += kLanes<double>) {
      if (((word >> at) & kAllLanes<double>) == 0) continue;
      const Mask<double> label = load_exactly<kLanes<double>>(from + at);
      ones_ |= bits_where_any(label, 1) << at;
      others_ |= bits_where_any(label, ~int64_t{1}) << at;
    }
  }

  template <typename stored_t>
  EHRSEQ_INLINE void read_numbers(const stored_t* from, uint64_t word) {
    for (int64_t at = 0; at < kBlockSlots; at += kLanes<double>) {
      if (((word >> at) & kAllLanes<double>) == 0) continue;
      const Doubles label = load_doubles(from + at);
      ones_ |= bits_where(label == 1.0) << at;
      others_ |= bits_where((label != 0.0) & (label != 1.0)) << at;  // NaN among them
    }
  }

  Stored stored_;
  const char* from_;
  uint64_t ones_ = 0;
  uint64_t others_ = 0;
};

template <typename scalar_t>
class GivenLoss {
  using T = accumulator_t<scalar_t>;

 public:
  EHRSEQ_INLINE explicit GivenLoss(double share)
      : share_(share), scale_(broadcast(static_cast<T>(share))) {}

  // A whole block of slots from number `slot` on.
  EHRSEQ_INLINE void add(const GivenSlots<scalar_t>& given, int64_t slot, uint64_t word) {
    auto* grad = given.grad == nullptr ? nullptr : given.grad + slot;
    if (word == 0) {
      if (grad != nullptr) std::fill_n(grad, kBlockSlots, saved_grad_t<scalar_t>(0));
      return;
    }
    const LabelsOfBlock labels(given.labels, slot, word);
    if (labels.are_wrong()) is_wrong_ = true;
    if (labels.are_bits() && given.weights.stored == Stored::kBool) {
      return add_of_bits(given.logits + slot, labels, word, grad);
    }
    for (int64_t at = 0; at < kBlockSlots; at += kLanes<T>) {
      const uint64_t bits = (word >> at) & kAllLanes<T>;
      Lanes<T> slopes{};
      if (bits != 0) {
        const Mask<T> counts = lanes_of_bits<T>(bits);
        const Lanes<T> x = only_where<T>(counts, load(given.logits + slot + at));
        const Parts<T> parts = parts_of<T>(x, labels.template at<T>(at, bits, &wrong_));
        slopes = marked<T>(counts, weighted(parts, bits, given.weights, slot + at));
      }
      if (grad != nullptr) store(grad + at, slopes);
    }
  }

  EHRSEQ_INLINE double finish(bool* possible) {
    if (is_wrong_ || any_lane<double>(wrong_)) *possible = false;
    terms_.flush();
    return terms_.unfinished().rest + sum_of_all<T>(sums_);
  }

 private:
  // Of labels that are 0 or 1, and weights that are 1.
  EHRSEQ_INLINE void add_of_bits(const scalar_t* logits, const LabelsOfBlock& labels, uint64_t word,
                                 saved_grad_t<scalar_t>* grad) {
    constexpr int64_t kVectors = kBlockSlots / kLanes<T>;
    static_assert(2 * kVectors <= SumOfTerms<T>::kMostVectors);
    vectors_ += kVectors;
    if (vectors_ > SumOfTerms<T>::kMostVectors) {
      terms_.flush();
      vectors_ = kVectors;
    }
    for (int64_t at = 0; at < kBlockSlots; at += kLanes<T>) {
      const uint64_t bits = (word >> at) & kAllLanes<T>;
      Lanes<T> slopes{};
      if (bits != 0) {
        const Mask<T> counts = lanes_of_bits<T>(bits);
        const Lanes<T> x = only_where<T>(counts, load(logits + at));
        slopes = terms_.add(x, labels.template ones<T>(at), scale_, counts);
      }
      if (grad != nullptr) store(grad + at, slopes);
    }
  }

  // Adds the terms, and gives their derivatives, times weights.
  EHRSEQ_INLINE Lanes<T> weighted(const Parts<T>& parts, uint64_t bits, const Numbers& weights,
                                  int64_t slot) {
    Wide<T> weight;
    const Wide<T> term = widen(parts.term());
    for (int i = 0; i < Wide<T>::kParts; ++i) {
      const int64_t first = i * kLanes<double>;
      weight.part[i] = load_weights(slot_of(weights, slot + first), weights.stored);
      const Mask<double> counted = lanes_of_bits<double>(bits >> first);
      sums_.part[i] += only_where<double>(counted, term.part[i] * weight.part[i]);
      weight.part[i] *= share_;
    }
    return parts.slope * narrow(weight);
  }

  // Of slots that count.
  static EHRSEQ_INLINE Doubles load_weights(const char* from, Stored stored) {
    if (stored == Stored::kBool) return broadcast(1.0);
    if (stored == Stored::kFloat) return load_doubles(reinterpret_cast<const float*>(from));
    if (stored == Stored::kLong) return load_doubles(reinterpret_cast<const int64_t*>(from));
    return load_doubles(reinterpret_cast<const double*>(from));
  }

  double share_;
  Wide<T> sums_{};
  Lanes<T> scale_;
  SumOfTerms<T> terms_;
  int64_t vectors_ = 0;  // in terms_ since it was flushed
  Mask<double> wrong_{};
  bool is_wrong_ = false;
};

template <typename scalar_t>
double loss_of_given(const GivenSlots<scalar_t>& given, double share, bool* possible) {
  GivenLoss<scalar_t> loss(share);
  const int64_t blocks = given.slots_left / kBlockSlots;  // whole ones
  const auto prefetch = [&](int64_t block) __attribute__((always_inline)) {
    if (block >= blocks) return;
    const int64_t slot = block * kBlockSlots;
    const uint64_t word = given.words[block];
    if (word == 0) return;
    prefetch_where(word, given.logits + slot, sizeof(scalar_t));
    if (given.reads_labels_ahead) {
      prefetch_where(word, slot_of(given.labels, slot), bytes_of(given.labels.stored));
    }
  };
  const int64_t whole = given.slots / kBlockSlots;
  for (int64_t block = 0; block < whole; ++block) {
    prefetch(block + kBlocksAhead);
    loss.add(given, block * kBlockSlots, given.words[block]);
  }
  const int64_t first = whole * kBlockSlots;
  const int64_t rest = given.slots - first;
  if (rest > 0) {
    scalar_t logits[kBlockSlots] = {};
    char labels[kBlockSlots * 8] = {};
    char weights[kBlockSlots * 8] = {};
    saved_grad_t<scalar_t> grad[kBlockSlots];
    std::copy_n(given.logits + first, rest, logits);
    std::memcpy(labels, slot_of(given.labels, first), rest * bytes_of(given.labels.stored));
    std::memcpy(weights, slot_of(given.weights, first), rest * bytes_of(given.weights.stored));
    GivenSlots<scalar_t> last = given;
    last.logits = logits;
    last.labels.data = labels;
    last.weights.data = weights;
    last.grad = given.grad == nullptr ? nullptr : grad;
    loss.add(last, 0, given.words[whole]);
    if (given.grad != nullptr) std::copy_n(grad, rest, given.grad + first);
  }
  return loss.finish(possible);
}

}  // namespace ehrseq::fixed_horizon::EHRSEQ_ISA
