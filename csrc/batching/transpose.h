// The transposed code index: which visits hold code k. The gradient of the embedding is then a
// segmented sum over it, so that each row of the gradient is written once and in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace ehrseq::batching {

// The segments of the index.
struct CodeSegments {
  std::vector<int32_t> codes;    // the distinct codes, ascending
  std::vector<int32_t> offsets;  // where each code's visits begin; one more entry than codes
};

// The codes of a batch, grouped by visit.
struct GroupedCodes {
  const int32_t* codes;
  const int32_t* code_offsets;
  int64_t n_visits;
  int64_t n_codes;
};

// Stable counting sort. `next` is a histogram of the codes, and then the position of each code's
// next visit; visits are read in ascending order, so each code's visits are ascending.
inline CodeSegments transpose_by_counting(const GroupedCodes& packed, int64_t n_kinds,
                                          int32_t* visits) {
  std::vector<int32_t> next(n_kinds, 0);
  for (int64_t i = 0; i < packed.n_codes; ++i) ++next[packed.codes[i]];

  CodeSegments index;
  int32_t start = 0;
  for (int64_t code = 0; code < n_kinds; ++code) {
    if (next[code] == 0) continue;
    index.codes.push_back(static_cast<int32_t>(code));
    index.offsets.push_back(start);
    start += std::exchange(next[code], start);
  }
  index.offsets.push_back(start);

  for (int64_t visit = 0; visit < packed.n_visits; ++visit)
    for (int32_t i = packed.code_offsets[visit]; i < packed.code_offsets[visit + 1]; ++i)
      visits[next[packed.codes[i]]++] = static_cast<int32_t>(visit);
  return index;
}

struct Entry {
  int32_t code;
  int32_t visit;
};

constexpr int kDigitBits = 11;  // a histogram of 2,048 counters stays in the L1 cache

inline void sort_by_digit(const std::vector<Entry>& from, std::vector<Entry>& to, int shift) {
  constexpr int32_t kDigits = 1 << kDigitBits;
  const auto digit = [shift](int32_t code) { return (code >> shift) & (kDigits - 1); };
  std::vector<int32_t> next(kDigits, 0);
  for (const auto& entry : from) ++next[digit(entry.code)];
  int32_t start = 0;
  for (auto& place : next) start += std::exchange(place, start);
  for (const auto& entry : from) to[next[digit(entry.code)]++] = entry;
}

// Stable radix sort, for code ids so large (raw concept ids, say) that counting them one by one
// would mean walking a histogram far longer than the batch.
inline CodeSegments transpose_by_radix(const GroupedCodes& packed, int32_t max_code,
                                       int32_t* visits) {
  std::vector<Entry> entries(packed.n_codes), scratch(packed.n_codes);
  for (int64_t visit = 0; visit < packed.n_visits; ++visit)
    for (int32_t i = packed.code_offsets[visit]; i < packed.code_offsets[visit + 1]; ++i)
      entries[i] = {packed.codes[i], static_cast<int32_t>(visit)};
  for (int shift = 0; shift < 31 && (max_code >> shift) > 0; shift += kDigitBits) {
    sort_by_digit(entries, scratch, shift);
    std::swap(entries, scratch);
  }

  CodeSegments index;
  for (int64_t i = 0; i < packed.n_codes; ++i) {
    if (i == 0 || entries[i].code != entries[i - 1].code) {
      index.codes.push_back(entries[i].code);
      index.offsets.push_back(static_cast<int32_t>(i));
    }
    visits[i] = entries[i].visit;
  }
  index.offsets.push_back(static_cast<int32_t>(packed.n_codes));
  return index;
}

// Writes the visits of every code into `visits` [n_codes].
inline CodeSegments transpose(const GroupedCodes& packed, int32_t* visits) {
  int32_t max_code = -1;
  for (int64_t i = 0; i < packed.n_codes; ++i) max_code = std::max(max_code, packed.codes[i]);
  const int64_t n_kinds = static_cast<int64_t>(max_code) + 1;
  const bool histogram_is_small = n_kinds <= 65536 + 4 * packed.n_codes;
  return histogram_is_small ? transpose_by_counting(packed, n_kinds, visits)
                            : transpose_by_radix(packed, max_code, visits);
}

}  // namespace ehrseq::batching
