// Masks of padded visits: their dtypes, and finding the slots that they keep.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/options.h"
#include "common/tensors.h"
#include "visit_pool/code_index.h"
#include "visit_pool/segments.h"
#include "visit_pool/slots.h"

namespace ehrseq {

// Calls body(TypeTag<mask_t>{}) for the C++ type of the mask; bool where there is none.
template <typename Body>
void dispatch_mask(const OptionalTensor& mask, const Body& body) {
  switch (mask.has_value() ? mask->scalar_type() : ScalarType::Bool) {
    case ScalarType::Bool:
      return body(TypeTag<bool>{});
    case ScalarType::Byte:
      return body(TypeTag<uint8_t>{});
    case ScalarType::Int:
      return body(TypeTag<int32_t>{});
    case ScalarType::Long:
      return body(TypeTag<int64_t>{});
    case ScalarType::Float:
      return body(TypeTag<float>{});
    case ScalarType::Double:
      return body(TypeTag<double>{});
    default:
      throw std::invalid_argument(
          "visit_pool: mask: expected bool, uint8, int32, int64, float32 or float64, got " +
          as_text(mask->scalar_type()));
  }
}

// A visit's slots are counted in 32 bits: fewer visits are processed together where there are many.
inline int64_t visits_per_step(int64_t wanted, int64_t n_slots) {
  const int64_t fit = INT32_MAX / (n_slots > 0 ? n_slots : 1);
  return fit < wanted ? (fit > 0 ? fit : 1) : wanted;
}

template <typename mask_t>
const mask_t* mask_of_visit(const OptionalTensor& mask, int64_t visit, int64_t n_slots) {
  if (!mask.has_value()) return nullptr;
  return static_cast<const mask_t*>(mask->data_ptr()) + visit * n_slots;
}

// Calls body(at, weight) for every slot that the mask keeps of some neighbouring visits, and
// end_visit() after each of them; `at` is counted from the first slot of the first. With no mask
// every slot is kept.
template <typename mask_t, typename Body, typename EndVisit>
void for_each_real_slot(const mask_t* mask, int64_t n_visits, int64_t n_slots, const Body& body,
                        const EndVisit& end_visit) {
  int64_t at = 0;
  for (int64_t visit = 0; visit < n_visits; ++visit) {
    for (const int64_t end = at + n_slots; at < end; ++at) {
      if (mask == nullptr) {
        body(at, 1.0);
      } else if (!(mask[at] == mask_t(0))) {
        body(at, static_cast<double>(mask[at]));
      }
    }
    end_visit();
  }
}

// number / divisor of 32-bit numbers, by a product.
class Divisor {
 public:
  explicit Divisor(uint32_t divisor) : inverse_(divisor < 2 ? 0 : UINT64_MAX / divisor + 1) {}
  uint32_t divides(uint32_t number) const {
    if (inverse_ == 0) return number;
    return static_cast<uint32_t>((static_cast<unsigned __int128>(inverse_) * number) >> 64);
  }

 private:
  uint64_t inverse_;
};

// The real slots of some neighbouring visits: which table rows they add, with what weight, and, for
// the mean, the scale of each visit that has any. A bool mask, or none, has no weights but 1. Most
// visits of a padded batch have no real slot and take no space here.
template <typename acc_t, typename mask_t>
class RealSlots : public FoundEntries<acc_t> {
 public:
  static constexpr bool kIsWeighted = !std::is_same_v<mask_t, bool>;

  using FoundEntries<acc_t>::rows;
  using FoundEntries<acc_t>::weights;
  using FoundEntries<acc_t>::held_visits;
  using FoundEntries<acc_t>::offsets;
  using FoundEntries<acc_t>::scales;
  using FoundEntries<acc_t>::n_entries;
  using FoundEntries<acc_t>::n_held;
  std::vector<int32_t> visits;  // of each entry, counted from the first

  // row_of(at) is the row of the slot `at`, counted from the first slot of the first visit, and
  // row_of.prefetch(at) says that it will be asked for.
  template <typename RowOf>
  void collect(const mask_t* mask, int64_t n_visits, int64_t n_slots, const RowOf& row_of) {
    n_visits_ = n_visits;
    if (mask == nullptr) {
      keep_all(n_visits, n_slots, row_of);
    } else {
      find(n_visits * n_slots, [&](int64_t at, int64_t count, int32_t* positions) {
        return find_set(mask + at, count, static_cast<int32_t>(at), positions);
      });
      look_up(mask, n_visits, n_slots, row_of);
    }
    make_room(scales, n_held);
    for (int64_t i = 0; i < n_held; ++i) scales[i] = acc_t(1) / divisor_of(i);
  }

  // With no mask, the slots of all codes but one, which takes part in the mean all the same.
  // row_of.find_others(at, count, code, positions) finds them.
  template <typename RowOf>
  void collect_others(int64_t code, int64_t n_visits, int64_t n_slots, const RowOf& row_of) {
    static_assert(!kIsWeighted);
    n_visits_ = n_visits;
    find(n_visits * n_slots, [&](int64_t at, int64_t count, int32_t* positions) {
      return row_of.find_others(at, count, code, positions);
    });
    look_up(nullptr, n_visits, n_slots, row_of);
    make_room(scales, n_held);
    std::fill_n(scales.begin(), n_held, acc_t(1) / static_cast<acc_t>(n_slots));
  }

  // Null where all are 1.
  const acc_t* weights_or_none() const { return kIsWeighted ? weights.data() : nullptr; }
  acc_t weight(int64_t entry) const { return kIsWeighted ? weights[entry] : acc_t(1); }

  // Calls held(i, j, visit) for each run of neighbouring visits that have entries, the i-th to the
  // j-th of held_visits, of which `visit` is the first, and empty(from, to) for the visits between.
  template <typename Held, typename Empty>
  void for_each_run(const Held& held, const Empty& empty) const {
    int64_t visit = 0;
    for (int64_t begin = 0; begin < n_held;) {
      const int64_t first = held_visits[begin];
      int64_t end = begin + 1;
      while (end < n_held && held_visits[end] == first + (end - begin)) ++end;
      if (visit < first) empty(visit, first);
      held(begin, end, first);
      visit = first + (end - begin);
      begin = end;
    }
    if (visit < n_visits_) empty(visit, n_visits_);
  }

 private:
  template <typename T>
  static void make_room(std::vector<T>& items, int64_t count) {
    if (static_cast<int64_t>(items.size()) < count) items.resize(count);
  }

  acc_t divisor_of(int64_t held) const {
    const int32_t begin = offsets[held];
    const int32_t end = offsets[held + 1];
    if constexpr (kIsWeighted) {
      acc_t total = 0;
      for (int32_t i = begin; i < end; ++i) total += weights[i];
      return total < acc_t(1) ? acc_t(1) : total;
    } else {
      return static_cast<acc_t>(end - begin);
    }
  }

  template <typename RowOf>
  void keep_all(int64_t n_visits, int64_t n_slots, const RowOf& row_of) {
    n_entries = n_visits * n_slots;
    n_held = n_slots > 0 ? n_visits : 0;
    make_room(rows, n_entries);
    make_room(visits, n_entries);
    make_room(weights, kIsWeighted ? n_entries : 0);
    make_room(held_visits, n_held);
    make_room(offsets, n_held + 1);
    offsets[0] = 0;
    int64_t entry = 0;
    for (int64_t visit = 0; visit < n_held; ++visit) {
      for (const int64_t end = entry + n_slots; entry < end; ++entry) {
        rows[entry] = row_of(entry);
        visits[entry] = static_cast<int32_t>(visit);
        if constexpr (kIsWeighted) weights[entry] = acc_t(1);
      }
      held_visits[visit] = static_cast<int32_t>(visit);
      offsets[visit + 1] = static_cast<int32_t>(entry);
    }
  }

  // Leaves the positions of the real slots in `visits`: find_some(at, count, positions) finds those
  // of `count` slots from `at` on.
  template <typename FindSome>
  void find(int64_t count, const FindSome& find_some) {
    constexpr int64_t kAtOnce = 4096;
    constexpr int64_t kRoom = kAtOnce + 4;
    n_entries = 0;
    for (int64_t at = 0; at < count; at += kAtOnce) {
      if (static_cast<int64_t>(visits.size()) < n_entries + kRoom) {
        visits.resize(2 * n_entries + kRoom);
      }
      n_entries += find_some(at, std::min(kAtOnce, count - at), visits.data() + n_entries);
    }
  }

  // Makes the positions in `visits` entries.
  template <typename RowOf>
  void look_up(const mask_t* mask, int64_t n_visits, int64_t n_slots, const RowOf& row_of) {
    const int64_t most_held = std::min(n_visits, n_entries);
    make_room(rows, n_entries);
    make_room(weights, kIsWeighted ? n_entries : 0);
    make_room(held_visits, most_held);
    make_room(offsets, most_held + 1);
    const Divisor slots(static_cast<uint32_t>(n_slots));
    int32_t* const visit_of = visits.data();
    int32_t* const rows_out = rows.data();
    int32_t* const held_out = held_visits.data();
    int32_t* const offsets_out = offsets.data();
    constexpr int64_t kAhead = 24;
    int64_t held = 0;
    int32_t before = -1;
    offsets_out[0] = 0;
    for (int64_t entry = 0; entry < n_entries; ++entry) {
      const int32_t at = visit_of[entry];
      // the real codes lie far apart, each visit's in lines of their own
      if (entry + kAhead < n_entries) row_of.prefetch(visit_of[entry + kAhead]);
      const auto visit = static_cast<int32_t>(slots.divides(static_cast<uint32_t>(at)));
      rows_out[entry] = row_of(at);
      visit_of[entry] = visit;
      if constexpr (kIsWeighted) weights[entry] = static_cast<acc_t>(static_cast<double>(mask[at]));
      held += visit != before;
      before = visit;
      held_out[held - 1] = visit;
      offsets_out[held] = static_cast<int32_t>(entry + 1);
    }
    n_held = held;
  }

  int64_t n_visits_ = 0;
};

// Pools the visits that real slots were collected of: `out` and `arg_max` are those of the first.
template <typename scalar_t, typename mask_t>
void pool_real_slots(const RealSlots<accumulator_t<scalar_t>, mask_t>& kept, int64_t mode,
                     const scalar_t* table, int64_t row_size, const int32_t* ids, scalar_t* out,
                     int32_t* arg_max) {
  const Segments<accumulator_t<scalar_t>> segments{kept.rows.data(), kept.weights_or_none(),
                                                   mode == kMean ? kept.scales.data() : nullptr,
                                                   kept.offsets.data()};
  const auto& kernels = row_kernels<scalar_t>();
  kept.for_each_run(
      [&](int64_t begin, int64_t end, int64_t visit) {
        const int64_t at = visit * row_size;
        if (mode == kMax) {
          kernels.max_segments(table, row_size, segments.rows, ids, segments.offsets, begin, end,
                               out + at, arg_max + at);
        } else {
          kernels.sum_segments(table, row_size, segments, begin, end, out + at);
        }
      },
      [&](int64_t from, int64_t to) {
        const int64_t at = from * row_size;
        const int64_t count = (to - from) * row_size;
        if (count == 0) return;
        std::memset(static_cast<void*>(out + at), 0, count * sizeof(scalar_t));
        if (mode == kMax) std::fill_n(arg_max + at, count, -1);
      });
}

}  // namespace ehrseq
