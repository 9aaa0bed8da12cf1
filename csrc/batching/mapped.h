// Flat records whose codes index a dictionary, and are mapped to those of a model as they are
// copied. Codes of one visit that the model does not tell apart become one: a visit's codes come
// out ascending and distinct.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "batching/records.h"

namespace ehrseq::batching {

// The model's code of each code of the dictionary.
struct CodeMap {
  const int32_t* codes;
  int64_t size;

  bool holds(int64_t code) const { return code >= 0 && code < size; }
};

class MappedRecords : public FlatRecords {
 public:
  // FlatRecords copies all that is indexed by; a mapped code is read once, and what is checked
  // against the vocabulary is what was read.
  MappedRecords(FlatRecords records, CodeMap map) : FlatRecords(std::move(records)), map_(map) {}

  int32_t* copy_visit(int64_t patient, int64_t visit, int32_t* to, const Vocabulary& vocabulary,
                      bool& all_inside) const {
    const int64_t* const offsets = offsets_of(patient) + visit;
    int32_t* const begin = to;
    int64_t last = -1;
    bool ascending = true;
    for (int64_t at = offsets[0]; at < offsets[1]; ++at) {
      const int64_t code = code_at(at);
      if (!map_.holds(code)) {
        all_inside = false;
        continue;
      }
      const int32_t mapped = map_.codes[code];
      all_inside &= vocabulary.holds(mapped);
      ascending &= mapped > last;
      last = mapped;
      *to++ = mapped;
    }
    if (ascending) return to;
    std::sort(begin, to);
    return std::unique(begin, to);
  }

  [[noreturn]] void refuse_codes_outside(const Vocabulary& vocabulary) const {
    refuse_where("outside the dictionary: expected 0 <= code < " + text(map_.size),
                 [&](int64_t code) { return !map_.holds(code); });
    refuse_where(
        "that code_map takes outside the vocabulary: expected 0 <= code_map[code] < " +
            text(vocabulary.size),
        [&](int64_t code) { return map_.holds(code) && !vocabulary.holds(map_.codes[code]); });
    refuse_race("The codes");
  }

 private:
  template <typename IsWrong>
  void refuse_where(const std::string& what, const IsWrong& is_wrong) const {
    Offenders wrong;
    int64_t first_code = 0;
    for (int64_t patient = 0; patient < n_patients(); ++patient) {
      for (int64_t visit = 0; visit < length(patient); ++visit) {
        const int64_t* const offsets = offsets_of(patient) + visit;
        for (int64_t at = offsets[0]; at < offsets[1]; ++at) {
          const int64_t code = code_at(at);
          if (!is_wrong(code)) continue;
          if (!wrong) first_code = code;
          wrong.add(patient, visit, at - offsets[0]);
        }
      }
    }
    if (wrong)
      refuse_index("Found " + text(wrong.count) + " codes " + what + ". The first is " +
                   text(first_code) + ": " + name(wrong.patient) + ", visit " + text(wrong.visit) +
                   ", code " + text(wrong.code) + ".");
  }

  CodeMap map_;
};

}  // namespace ehrseq::batching
