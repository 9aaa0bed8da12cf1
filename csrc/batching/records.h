// Where a batch's codes come from: flat arrays, or padded tensors. Both answer the same questions,
// so that packing (pack.h) is written once:
//   n_patients()                          how many patients the batch has
//   length(patient)                       how many visits
//   count_codes(patient)                  how many codes in all of them
//   source_row(patient, visit)            the visit's row in the caller's arrays
//   copy_visit(patient, visit, to, all)   writes the visit's codes, returns where they end; no more
//                                         of them than count_codes counts
//   name(patient)                         the patient's name in error messages
// Everything but the codes is checked when the records are constructed. The codes are checked while
// they are copied: `all` collects every bit that was seen outside the vocabulary.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "batching/errors.h"

namespace ehrseq::batching {

// Codes are checked against this range. Without a vocabulary, all that int32 can hold is allowed,
// except its largest value, which stays free for kernels that need a code that no visit has.
struct Vocabulary {
  int64_t size;

  bool holds(int64_t code) const { return code >= 0 && code < size; }
};

// A one-dimensional array of int32 or int64 with any stride, read in place: the big arrays may
// be memory-mapped and must not be copied, not even when they are a column of a table.
struct IntColumn {
  const char* data = nullptr;
  int64_t stride = 0;
  int64_t size = 0;
  bool wide = true;

  int64_t operator[](int64_t i) const {
    const char* at = data + i * stride;
    if (wide) {
      int64_t value;
      std::memcpy(&value, at, sizeof(value));
      return value;
    }
    int32_t value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }

  // Asks for a patient's part of the array, which is at a random place in memory, ahead of its use.
  // Not inlined, GCC takes it for a function without effect and leaves the calls out.
#ifdef __GNUC__
  [[gnu::always_inline]]
#endif
  void prefetch([[maybe_unused]] int64_t first, [[maybe_unused]] int64_t end) const {
#ifdef __GNUC__
    constexpr int64_t kMost = 4096, kLine = 64;
    if (first < 0 || end > size || first >= end) return;
    const char* const begin = data + first * stride;
    const int64_t bytes = std::min((end - first) * stride, kMost);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at);
#endif
  }
};

enum class IntKind : uint8_t { kInt64, kInt32, kInt16, kInt8, kUint64, kUint32, kUint16, kUint8 };

template <typename int_t>
int_t read_int(const char* at) {
  int_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

// Of a uint64 that no int64 holds the largest int64, which is outside every vocabulary as well.
inline int64_t read_other_int(IntKind kind, const char* at) {
  switch (kind) {
    case IntKind::kInt16:
      return read_int<int16_t>(at);
    case IntKind::kInt8:
      return read_int<int8_t>(at);
    case IntKind::kUint32:
      return read_int<uint32_t>(at);
    case IntKind::kUint16:
      return read_int<uint16_t>(at);
    case IntKind::kUint8:
      return read_int<uint8_t>(at);
    default: {
      constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
      return static_cast<int64_t>(std::min(read_int<uint64_t>(at), kMost));
    }
  }
}

// Codes may be narrower, and without a sign. The two dtypes that most have are read as offsets are.
struct CodeColumn {
  IntColumn column;
  IntKind kind = IntKind::kInt64;

  bool is_plain() const { return kind == IntKind::kInt64 || kind == IntKind::kInt32; }
  int64_t operator[](int64_t i) const {
    return is_plain() ? column[i] : read_other_int(kind, column.data + i * column.stride);
  }
};

[[noreturn]] inline void refuse_empty_sequences(const Offenders& empty, const std::string& first) {
  refuse_value(
      "Found " + text(empty.count) +
      " sequences with zero length. All sequences must have at least 1 visit. The first is " +
      first + ".");
}

[[noreturn]] inline void refuse_codes(const Offenders& outside, const std::string& code,
                                      const Vocabulary& vocabulary, const std::string& patient) {
  if (!outside) refuse_race("The codes");  // they are inside by now
  refuse_index("Found " + text(outside.count) +
               " codes outside the vocabulary: expected 0 <= code < " + text(vocabulary.size) +
               ". The first is " + code + ": " + patient + ", visit " + text(outside.visit) +
               ", code " + text(outside.code) + ".");
}

// A code that no int64 holds, which lists can hold: where it is, and how a message writes it.
struct HugeCode {
  int64_t at = -1;
  std::string text;
};

// All patients' visits and codes end to end, and the patients that this batch takes from them.
//
// Other threads may write to the arrays meanwhile, as the GIL is released: all that is indexed by
// is copied first, and what is checked is the copy.
class FlatRecords {
 public:
  // `n_visits`, one for each chosen patient, takes that many of its first visits; null takes all.
  FlatRecords(CodeColumn codes, const IntColumn& visit_offsets, const IntColumn& patient_offsets,
              const int64_t* chosen, int64_t n_chosen, HugeCode huge = {},
              const int64_t* n_visits = nullptr)
      : codes_(codes), huge_(std::move(huge)), is_chosen_(chosen != nullptr) {
    if (chosen) chosen_.assign(chosen, chosen + n_chosen);
    const int64_t n_records = patient_offsets.size - 1;
    check_chosen(n_records);
    find_visits(chosen ? n_chosen : n_records, patient_offsets, visit_offsets.size - 1);
    if (n_visits) take_first_visits(n_visits);
    copy_visit_offsets(visit_offsets);
    check_visit_offsets();
  }

  int64_t n_patients() const { return static_cast<int64_t>(length_.size()); }
  int64_t length(int64_t patient) const { return length_[patient]; }
  int64_t source_row(int64_t patient, int64_t visit) const { return first_visit_[patient] + visit; }

  int64_t count_codes(int64_t patient) const {
    const int64_t* const offsets = offsets_of(patient);
    return offsets[length_[patient]] - offsets[0];
  }

  int32_t* copy_visit(int64_t patient, int64_t visit, int32_t* to, const Vocabulary& vocabulary,
                      bool& all_inside) const {
    const int64_t* const offsets = offsets_of(patient) + visit;
    if (!codes_.is_plain()) return copy_other(offsets[0], offsets[1], to, vocabulary, all_inside);
    for (int64_t at = offsets[0]; at < offsets[1]; ++at) {
      const int64_t code = codes_.column[at];
      all_inside &= vocabulary.holds(code);
      *to++ = static_cast<int32_t>(code);
    }
    return to;
  }

  std::string name(int64_t patient) const {
    if (!is_chosen_) return "patient " + text(patient);
    return "patient " + text(patient) + " (record " + text(chosen_[patient]) + ")";
  }

  [[noreturn]] void refuse_codes_outside(const Vocabulary& vocabulary) const {
    Offenders outside;
    std::string first_code;
    for (int64_t patient = 0; patient < n_patients(); ++patient) {
      for (int64_t visit = 0; visit < length(patient); ++visit) {
        const int64_t* const offsets = offsets_of(patient) + visit;
        for (int64_t at = offsets[0]; at < offsets[1]; ++at) {
          const int64_t code = codes_[at];
          if (vocabulary.holds(code)) continue;
          if (!outside) first_code = at == huge_.at ? huge_.text : text(code);
          outside.add(patient, visit, at - offsets[0]);
        }
      }
    }
    refuse_codes(outside, first_code, vocabulary, name(outside.patient));
  }

 protected:
  // Of a dictionary's codes, which are never narrower.
  int64_t code_at(int64_t at) const { return codes_.column[at]; }

  // One more than the patient has visits.
  const int64_t* offsets_of(int64_t patient) const {
    return visit_offsets_.data() + first_offset_[patient];
  }

 private:
#ifdef __GNUC__
  [[gnu::noinline]]
#endif
  int32_t* copy_other(int64_t begin, int64_t end, int32_t* to, const Vocabulary& vocabulary,
                      bool& all_inside) const {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t code = codes_[at];
      all_inside &= vocabulary.holds(code);
      *to++ = static_cast<int32_t>(code);
    }
    return to;
  }

  void check_chosen(int64_t n_records) const {
    Offenders outside;
    for (size_t p = 0; p < chosen_.size(); ++p)
      if (chosen_[p] < 0 || chosen_[p] >= n_records) outside.add(p);
    if (outside)
      refuse_index("Found " + text(outside.count) + " patient numbers outside the " +
                   text(n_records) + " records. The first is " + text(chosen_[outside.patient]) +
                   ", at position " + text(outside.patient) + ".");
  }

  void find_visits(int64_t n, const IntColumn& patient_offsets, int64_t n_visits) {
    first_visit_.resize(n);
    length_.resize(n);
    Offenders falling, empty;
    int64_t first_begin = 0, first_end = 0;
    for (int64_t p = 0; p < n; ++p) {
      const int64_t record = is_chosen_ ? chosen_[p] : p;
      const int64_t begin = patient_offsets[record];
      const int64_t end = patient_offsets[record + 1];
      if (begin < 0 || end < begin || end > n_visits) {
        if (!falling) first_begin = begin, first_end = end;
        falling.add(p);
        continue;
      }
      first_visit_[p] = begin;
      length_[p] = end - begin;
      if (begin == end) empty.add(p);
    }
    if (falling)
      refuse_value("patient_offsets must rise within [0, " + text(n_visits) + "]. Found " +
                   text(falling.count) + " patients where they do not. The first is " +
                   name(falling.patient) + ": from " + text(first_begin) + " to " +
                   text(first_end) + ".");
    if (empty) refuse_empty_sequences(empty, name(empty.patient));
  }

  void take_first_visits(const int64_t* n_visits) {
    Offenders outside;
    int64_t first_wanted = 0;
    for (int64_t p = 0; p < n_patients(); ++p) {
      const int64_t wanted = n_visits[p];
      if (wanted >= 1 && wanted <= length_[p]) {
        length_[p] = wanted;
        continue;
      }
      if (!outside) first_wanted = wanted;
      outside.add(p);
    }
    if (outside)
      refuse_value("n_visits: expected 1 to the patient's number of visits. Found " +
                   text(outside.count) + " others. The first is " + text(first_wanted) + ": " +
                   name(outside.patient) + ", with " + text(length_[outside.patient]) + " visits.");
  }

  // Reads the offsets of the chosen patients only, front to back.
  void copy_visit_offsets(const IntColumn& visit_offsets) {
    int64_t n_visits = 0;
    for (const int64_t length : length_) {
      if (length > kMostEntries - n_visits) refuse_visit_count(kMostEntries);
      n_visits += length;
    }
    first_offset_.reserve(length_.size());
    visit_offsets_.reserve(n_visits + n_patients());
    for (int64_t patient = 0; patient < n_patients(); ++patient) {
      if (const int64_t next = patient + kAhead; next < n_patients())
        visit_offsets.prefetch(first_visit_[next], first_visit_[next] + length_[next]);
      first_offset_.push_back(static_cast<int64_t>(visit_offsets_.size()));
      for (int64_t visit = 0; visit <= length(patient); ++visit)
        visit_offsets_.push_back(visit_offsets[first_visit_[patient] + visit]);
    }
  }

  void check_visit_offsets() const {
    Offenders falling;
    for (int64_t patient = 0; patient < n_patients(); ++patient) {
      const int64_t* const offsets = offsets_of(patient);
      for (int64_t visit = 0; visit < length(patient); ++visit) {
        const int64_t begin = offsets[visit], end = offsets[visit + 1];
        if (begin < 0 || end < begin || end > codes_.column.size) falling.add(patient, visit);
      }
      codes_.column.prefetch(offsets[0], offsets[length(patient)]);
    }
    if (falling) {
      const int64_t* const offsets = offsets_of(falling.patient) + falling.visit;
      refuse_value("visit_offsets must rise within [0, " + text(codes_.column.size) + "]. Found " +
                   text(falling.count) + " visits where they do not. The first is " +
                   name(falling.patient) + ", visit " + text(falling.visit) + ": from " +
                   text(offsets[0]) + " to " + text(offsets[1]) + ".");
    }
  }

  static constexpr int64_t kAhead = 8;  // patients whose offsets are fetched beforehand

  CodeColumn codes_;
  HugeCode huge_;
  bool is_chosen_;
  std::vector<int64_t> chosen_;
  std::vector<int64_t> first_visit_;
  std::vector<int64_t> length_;
  std::vector<int64_t> first_offset_;   // where each patient's offsets begin
  std::vector<int64_t> visit_offsets_;  // of the chosen patients, one after the other
};

// What a byte of a padded mask says: 2 and above mean a weight that is neither 0 nor 1,
// which cannot be packed.
enum MaskState : uint8_t { kPadding = 0, kReal = 1, kFractional = 2 };

struct PaddedShape {
  int64_t patients;
  int64_t visits;
  int64_t codes;
};

// Contiguous padded arrays. `code_states` and `visit_states` hold MaskStates, or are null where
// every slot is real; `lengths` is null where visit_states gives them.
template <typename code_t>
class PaddedRecords {
 public:
  PaddedRecords(const code_t* codes, PaddedShape shape, const uint8_t* code_states,
                const uint8_t* visit_states, const int64_t* lengths)
      : codes_(codes), shape_(shape), code_states_(code_states) {
    if (visit_states) read_lengths(visit_states);
    if (lengths) take_lengths(std::vector<int64_t>(lengths, lengths + shape.patients));
    if (!visit_states && !lengths) length_.assign(shape.patients, shape.visits);
    refuse_empty();
    count_real_codes();
  }

  int64_t n_patients() const { return shape_.patients; }
  int64_t length(int64_t patient) const { return length_[patient]; }
  int64_t count_codes(int64_t patient) const { return codes_of_patient_[patient]; }
  int64_t source_row(int64_t patient, int64_t visit) const {
    return patient * shape_.visits + visit;
  }

  int32_t* copy_visit(int64_t patient, int64_t visit, int32_t* to, const Vocabulary& vocabulary,
                      bool& all_inside) const {
    const int64_t row = source_row(patient, visit);
    const code_t* slots = codes_ + row * shape_.codes;
    const uint8_t* states = code_states_ ? code_states_ + row * shape_.codes : nullptr;
    // Real codes mostly come first, so stopping after the last of them skips most of the padding.
    int64_t left = code_states_ ? codes_of_visit_[row] : shape_.codes;
    for (int64_t slot = 0; left > 0 && slot < shape_.codes; ++slot) {
      if (states && states[slot] != kReal) continue;
      const int64_t code = slots[slot];
      all_inside &= vocabulary.holds(code);
      *to++ = static_cast<int32_t>(code);
      --left;
    }
    if (left > 0) refuse_race("The masks");
    return to;
  }

  std::string name(int64_t patient) const { return "patient " + text(patient); }

  [[noreturn]] void refuse_codes_outside(const Vocabulary& vocabulary) const {
    Offenders outside;
    int64_t first_code = 0;
    for_each_slot([&](int64_t patient, int64_t visit, int64_t slot, int64_t at) {
      if (code_states_ && code_states_[at] != kReal) return;
      if (vocabulary.holds(codes_[at])) return;
      if (!outside) first_code = codes_[at];
      outside.add(patient, visit, slot);
    });
    refuse_codes(outside, text(first_code), vocabulary, name(outside.patient));
  }

 private:
  template <typename Visitor>
  void for_each_slot(const Visitor& visitor) const {
    for (int64_t patient = 0; patient < n_patients(); ++patient)
      for (int64_t visit = 0; visit < length(patient); ++visit)
        for (int64_t slot = 0; slot < shape_.codes; ++slot)
          visitor(patient, visit, slot, source_row(patient, visit) * shape_.codes + slot);
  }

  void read_lengths(const uint8_t* visit_states) {
    length_.resize(shape_.patients);
    Offenders fractional, holes;
    for (int64_t patient = 0; patient < shape_.patients; ++patient) {
      const uint8_t* states = visit_states + patient * shape_.visits;
      int64_t length = 0;
      while (length < shape_.visits && states[length] == kReal) ++length;
      length_[patient] = length;
      bool has_hole = false;
      for (int64_t visit = length; visit < shape_.visits; ++visit) {
        if (states[visit] >= kFractional) fractional.add(patient, visit);
        has_hole |= states[visit] != kPadding;
      }
      if (has_hole) holes.add(patient, length);
    }
    if (fractional)
      refuse_value("sequence_mask must be 0 or 1. Found " + text(fractional.count) +
                   " other values. The first is at patient " + text(fractional.patient) +
                   ", visit " + text(fractional.visit) + ".");
    if (holes)
      refuse_value(
          "Found " + text(holes.count) +
          " sequence masks with holes: a patient's real visits must come first. The first is " +
          name(holes.patient) + ", visit " + text(holes.visit) + ".");
  }

  void take_lengths(std::vector<int64_t> lengths) {
    Offenders outside, different;
    for (int64_t patient = 0; patient < shape_.patients; ++patient) {
      if (lengths[patient] < 0 || lengths[patient] > shape_.visits) outside.add(patient);
      if (!length_.empty() && length_[patient] != lengths[patient]) different.add(patient);
    }
    if (outside)
      refuse_value("Found " + text(outside.count) + " lengths outside [1, " + text(shape_.visits) +
                   "], the padded visits. The first is " + text(lengths[outside.patient]) + ": " +
                   name(outside.patient) + ".");
    if (different)
      refuse_value("Found " + text(different.count) +
                   " lengths that disagree with sequence_mask. The first is " +
                   name(different.patient) + ": length " + text(lengths[different.patient]) +
                   ", but " + text(length_[different.patient]) + " visits in the mask.");
    length_ = std::move(lengths);
  }

  void refuse_empty() const {
    Offenders empty;
    for (int64_t patient = 0; patient < shape_.patients; ++patient)
      if (length_[patient] == 0) empty.add(patient);
    if (empty) refuse_empty_sequences(empty, name(empty.patient));
  }

  void count_real_codes() {
    codes_of_patient_.resize(shape_.patients);
    if (!code_states_) {
      for (int64_t patient = 0; patient < shape_.patients; ++patient)
        codes_of_patient_[patient] = length_[patient] * shape_.codes;
      return;
    }
    codes_of_visit_.resize(shape_.patients * shape_.visits);
    uint8_t seen = 0;
    for (int64_t patient = 0; patient < shape_.patients; ++patient) {
      for (int64_t visit = 0; visit < length_[patient]; ++visit) {
        const int64_t row = source_row(patient, visit);
        const uint8_t* states = code_states_ + row * shape_.codes;
        int64_t count = 0;
        for (int64_t slot = 0; slot < shape_.codes; ++slot) {
          count += states[slot] == kReal;
          seen |= states[slot];
        }
        codes_of_visit_[row] = static_cast<int32_t>(count);
        codes_of_patient_[patient] += count;
      }
    }
    if (seen >= kFractional) refuse_fractional();
  }

  [[noreturn]] void refuse_fractional() const {
    Offenders fractional;
    for_each_slot([&](int64_t patient, int64_t visit, int64_t slot, int64_t at) {
      if (code_states_[at] >= kFractional) fractional.add(patient, visit, slot);
    });
    if (!fractional) refuse_race("The masks");
    refuse_value("visit_mask must be 0 or 1 to be packed. Found " + text(fractional.count) +
                 " other values. The first is at " + name(fractional.patient) + ", visit " +
                 text(fractional.visit) + ", code " + text(fractional.code) +
                 ". Weights go in as code_weights.");
  }

  const code_t* codes_;
  PaddedShape shape_;
  const uint8_t* code_states_;
  std::vector<int64_t> length_;
  std::vector<int32_t> codes_of_visit_;
  std::vector<int64_t> codes_of_patient_;
};

}  // namespace ehrseq::batching
