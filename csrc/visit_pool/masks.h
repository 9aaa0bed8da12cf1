// Masks of padded visits: their dtypes, and finding the slots that they keep.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/tensors.h"
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
// the mean, 1 / max(sum of weights, 1) of each visit. A bool mask, or none, has no weights but 1.
template <typename acc_t, typename mask_t>
class RealSlots {
 public:
  static constexpr bool kIsWeighted = !std::is_same_v<mask_t, bool>;

  std::vector<int32_t> rows;
  std::vector<int32_t> visits;  // counted from the first
  std::vector<acc_t> weights;
  std::vector<acc_t> scales;
  std::vector<int32_t> offsets;

  // row_of(at) is the row of the slot `at`, counted from the first slot of the first visit.
  template <typename RowOf>
  void collect(const mask_t* mask, int64_t n_visits, int64_t n_slots, const RowOf& row_of) {
    if constexpr (!kIsWeighted) {
      if (mask != nullptr) {
        collect_from_bytes(reinterpret_cast<const uint8_t*>(mask), n_visits, n_slots, row_of);
        return scale_by_counts(n_visits);
      }
    }
    rows.clear();
    visits.clear();
    weights.clear();
    scales.clear();
    offsets.assign(1, 0);
    acc_t total = 0;
    for_each_real_slot(
        mask, n_visits, n_slots,
        [&](int64_t at, double weight) {
          rows.push_back(row_of(at));
          visits.push_back(static_cast<int32_t>(offsets.size() - 1));
          if constexpr (kIsWeighted) {
            weights.push_back(static_cast<acc_t>(weight));
            total += static_cast<acc_t>(weight);
          }
        },
        [&] {
          offsets.push_back(static_cast<int32_t>(rows.size()));
          if constexpr (kIsWeighted) {
            scales.push_back(acc_t(1) / (total < acc_t(1) ? acc_t(1) : total));
            total = 0;
          }
        });
    if constexpr (!kIsWeighted) scale_by_counts(n_visits);
  }

  // Null where all are 1.
  const acc_t* weights_or_none() const { return kIsWeighted ? weights.data() : nullptr; }
  acc_t weight(int64_t entry) const { return kIsWeighted ? weights[entry] : acc_t(1); }
  int64_t n_entries() const { return offsets.back(); }
  int64_t n_visits() const { return static_cast<int64_t>(offsets.size()) - 1; }

 private:
  template <typename RowOf>
  void collect_from_bytes(const uint8_t* bytes, int64_t n_visits, int64_t n_slots,
                          const RowOf& row_of) {
    constexpr int64_t kAtOnce = 4096;
    constexpr int64_t kRoom = kAtOnce + 4;
    const int64_t count = n_visits * n_slots;
    int64_t found = 0;
    for (int64_t at = 0; at < count; at += kAtOnce) {
      if (static_cast<int64_t>(visits.size()) < found + kRoom) visits.resize(2 * found + kRoom);
      found += find_set_bytes(bytes + at, std::min(kAtOnce, count - at), static_cast<int32_t>(at),
                              visits.data() + found);
    }
    if (static_cast<int64_t>(rows.size()) < found) rows.resize(visits.size());
    offsets.assign(n_visits + 1, 0);
    const Divisor slots(static_cast<uint32_t>(n_slots));
    for (int64_t entry = 0; entry < found; ++entry) {
      const int32_t at = visits[entry];
      const auto visit = static_cast<int32_t>(slots.divides(static_cast<uint32_t>(at)));
      rows[entry] = row_of(at);
      visits[entry] = visit;
      ++offsets[visit + 1];
    }
    for (int64_t visit = 0; visit < n_visits; ++visit) offsets[visit + 1] += offsets[visit];
  }

  void scale_by_counts(int64_t n_visits) {
    scales.resize(n_visits);
    for (int64_t visit = 0; visit < n_visits; ++visit) {
      const int32_t count = offsets[visit + 1] - offsets[visit];
      scales[visit] = acc_t(1) / static_cast<acc_t>(count < 1 ? 1 : count);
    }
  }
};

}  // namespace ehrseq
