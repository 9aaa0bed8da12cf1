// The outcome of each patient, on a GPU: columns of any dtype, whose values are not checked.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"

namespace ehrseq::survival::cuda {

using namespace ehrseq::cuda;  // NOLINT: what all kernels share

enum class Kind : int { kBool, kUnsigned, kSigned, kFloat, kHalf, kBFloat16 };

// Numbers of any real dtype, one after another `stride` elements apart; absent if data is null.
struct Numbers {
  const void* data;
  int64_t stride;
  int bytes;
  Kind kind;
};

__device__ inline int64_t integer_at(const Numbers& numbers, int64_t at) {
  at *= numbers.stride;
  switch (numbers.bytes) {
    case 1: {
      if (numbers.kind == Kind::kSigned) return static_cast<const int8_t*>(numbers.data)[at];
      const uint8_t byte = static_cast<const uint8_t*>(numbers.data)[at];
      return numbers.kind == Kind::kBool ? byte != 0 : byte;  // any byte but 0 is true
    }
    case 2:
      return static_cast<const int16_t*>(numbers.data)[at];
    case 4:
      return static_cast<const int32_t*>(numbers.data)[at];
    default:
      return static_cast<const int64_t*>(numbers.data)[at];
  }
}

__device__ inline double number_at(const Numbers& numbers, int64_t at) {
  const int64_t position = at * numbers.stride;
  switch (numbers.kind) {
    case Kind::kHalf:
      return widen(static_cast<const __half*>(numbers.data)[position]);
    case Kind::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(numbers.data)[position]);
    case Kind::kFloat:
      return numbers.bytes == 4 ? static_cast<const float*>(numbers.data)[position]
                                : static_cast<const double*>(numbers.data)[position];
    default:
      return static_cast<double>(integer_at(numbers, at));
  }
}

// Whether it is anything but 0: by its bits, of which a float's sign says nothing.
__device__ inline bool is_set(const Numbers& numbers, int64_t at) {
  at *= numbers.stride;
  const bool has_sign = numbers.kind > Kind::kSigned;
  switch (numbers.bytes) {
    case 1:
      return static_cast<const uint8_t*>(numbers.data)[at] != 0;
    case 2:
      return (static_cast<const uint16_t*>(numbers.data)[at] << has_sign & 0xffff) != 0;
    case 4:
      return static_cast<const uint32_t*>(numbers.data)[at] << has_sign != 0;
    default:
      return static_cast<const uint64_t*>(numbers.data)[at] << has_sign != 0;
  }
}

// The outcomes of all patients, in the caller's order.
struct OutcomeColumns {
  Numbers times;
  Numbers types;
  Numbers entries;  // absent: 0
  Numbers weights;  // absent: 1
  bool types_are_indicators;
  Numbers fractions{};  // absent: 1
};

// One patient's outcome, within the slots: `time` is `slots` where the event time is no slot.
struct ClampedOutcome {
  unsigned entry;
  unsigned survived_to;  // visits before this one were survived
  unsigned time;
  int64_t type;
  double weight;
  double fraction;  // of the interval at the event time

  // Visits from here on have no part in the loss.
  __device__ unsigned read_to(unsigned slots) const {
    return time < slots ? time + 1 : survived_to;
  }
};

__device__ inline ClampedOutcome outcome_of(int64_t patient, const OutcomeColumns& outcomes,
                                            unsigned slots) {
  const auto within = [slots](int64_t visit) {
    const int64_t held = visit < 0 ? 0 : visit;
    return held > slots ? slots : static_cast<unsigned>(held);
  };
  const int64_t time = integer_at(outcomes.times, patient);
  ClampedOutcome outcome;
  outcome.entry =
      outcomes.entries.data == nullptr ? 0 : within(integer_at(outcomes.entries, patient));
  outcome.survived_to = within(time);
  outcome.time = time < 0 ? slots : within(time);
  outcome.type = outcomes.types_are_indicators ? is_set(outcomes.types, patient)
                                               : integer_at(outcomes.types, patient);
  outcome.weight = outcomes.weights.data == nullptr ? 1.0 : number_at(outcomes.weights, patient);
  outcome.fraction =
      outcomes.fractions.data == nullptr ? 1.0 : number_at(outcomes.fractions, patient);
  return outcome;
}

}  // namespace ehrseq::survival::cuda
