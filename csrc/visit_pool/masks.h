// Masks of padded visits: their dtypes, and finding the slots that they keep.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/tensors.h"

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

// A bool mask keeps or drops; any other holds one weight per slot.
inline bool is_weighted(const OptionalTensor& mask) {
  return mask.has_value() && mask->scalar_type() != ScalarType::Bool;
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

// Calls body(slot, weight) for every slot of a visit that its mask keeps; with no mask, for all.
template <typename mask_t, typename Body>
void for_each_real_slot(const mask_t* mask, int64_t n_slots, const Body& body) {
  for (int64_t slot = 0; slot < n_slots; ++slot) {
    if (mask == nullptr) {
      body(slot, 1.0);
    } else if (!(mask[slot] == mask_t(0))) {
      body(slot, static_cast<double>(mask[slot]));
    }
  }
}

// Nearly all slots of a real batch are empty, so with a bool mask eight are tested together: eight
// empty ones cost one comparison.
template <typename Body>
void for_each_real_slot(const bool* mask, int64_t n_slots, const Body& body) {
  if (mask == nullptr) {
    for (int64_t slot = 0; slot < n_slots; ++slot) body(slot, 1.0);
    return;
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
  int64_t slot = 0;
  for (; slot + 8 <= n_slots; slot += 8) {
    uint64_t eight;
    std::memcpy(&eight, bytes + slot, 8);
    while (eight != 0) {
      const int byte = __builtin_ctzll(eight) / 8;
      body(slot + byte, 1.0);
      eight &= ~(uint64_t{0xFF} << (8 * byte));
    }
  }
  for (; slot < n_slots; ++slot) {
    if (bytes[slot] != 0) body(slot, 1.0);
  }
}

// The real slots of some neighbouring visits: which table rows they add, with what weight, and, for
// the mean, 1 / max(sum of weights, 1) of each visit.
template <typename acc_t>
struct RealSlots {
  std::vector<int32_t> rows;
  std::vector<acc_t> weights;
  std::vector<acc_t> scales;
  std::vector<int32_t> offsets;
  acc_t total = 0;

  void clear() {
    rows.clear();
    weights.clear();
    scales.clear();
    offsets.assign(1, 0);
    total = 0;
  }

  void add(int32_t row, double weight) {
    rows.push_back(row);
    weights.push_back(static_cast<acc_t>(weight));
    total += static_cast<acc_t>(weight);
  }

  void end_visit() {
    scales.push_back(acc_t(1) / (total < acc_t(1) ? acc_t(1) : total));
    offsets.push_back(static_cast<int32_t>(rows.size()));
    total = 0;
  }

  int64_t n_visits() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

}  // namespace ehrseq
