// Where the codes of a visit come from: padded slots under a mask, or a packed batch with or
// without attention. A source stages codes (and their weights) in shared memory, once per visit.
#pragma once

#include <cmath>

#include "visit_pool/lanes.cuh"

namespace ehrseq::cuda {

// A slot with mask 0 is padding and is never read.
template <typename acc_t>
struct Slot {
  bool real;
  acc_t weight;
};

// How many slots are left, capped at more than any read needs.
__device__ __forceinline__ int slots_left(int64_t first, int64_t end) {
  const int64_t left = end - first;
  return static_cast<int>(left < (1 << 20) ? left : 1 << 20);
}

enum class MaskKind : int { kNone, kBool, kByte, kInt, kLong, kFloat, kDouble };

struct Mask {
  const void* data;
  MaskKind kind;

  // This lane's slots first, first + stride, ..., all loaded before any is used; `left` is
  // the distance from the first to the end.
  template <int kSlots, typename acc_t>
  __device__ __forceinline__ void read(int64_t first, int stride, int left,
                                       Slot<acc_t> (&slots)[kSlots]) const {
    switch (kind) {
      case MaskKind::kNone:
#pragma unroll
        for (int i = 0; i < kSlots; ++i) slots[i] = {i * stride < left, acc_t(1)};
        return;
      case MaskKind::kBool:
        read_as<unsigned char>(first, stride, left, slots);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) slots[i].weight = acc_t(1);
        return;
      case MaskKind::kByte:
        return read_as<unsigned char>(first, stride, left, slots);
      case MaskKind::kInt:
        return read_as<int32_t>(first, stride, left, slots);
      case MaskKind::kLong:
        return read_as<int64_t>(first, stride, left, slots);
      case MaskKind::kFloat:
        return read_as<float>(first, stride, left, slots);
      case MaskKind::kDouble:
        return read_as<double>(first, stride, left, slots);
    }
  }

  template <typename mask_t, int kSlots, typename acc_t>
  __device__ __forceinline__ void read_as(int64_t first, int stride, int left,
                                          Slot<acc_t> (&slots)[kSlots]) const {
    const auto* masks = static_cast<const mask_t*>(data) + first;
    mask_t raw[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) raw[i] = i * stride < left ? masks[i * stride] : mask_t(0);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      slots[i] = {!(raw[i] == mask_t(0)), static_cast<acc_t>(raw[i])};
    }
  }

  // The sum of the masks of slots [begin, end), in every lane.
  template <typename acc_t>
  __device__ acc_t total(int64_t begin, int64_t end, const Lanes& lanes) const {
    constexpr int kSlots = 4;
    acc_t sum = 0;
    for (int64_t first = begin; first < end; first += kSlots * lanes.count) {
      Slot<acc_t> slots[kSlots];
      read(first + lanes.lane, lanes.count, slots_left(first, end) - lanes.lane, slots);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) sum += slots[i].real ? slots[i].weight : acc_t(0);
    }
    return lanes.sum(sum);
  }
};

// What a visit's sum is divided by to make its mean.
template <typename acc_t>
__device__ acc_t mean_scale(acc_t total) {
  return acc_t(1) / (total < acc_t(1) ? acc_t(1) : total);
}

// Padded codes, int32 or int64, checked as they are read. Without codes a slot is its own code: the
// rows of embeddings that already exist.
struct SlotCodes {
  const void* data;
  bool wide;
  int64_t vocabulary;

  // Those of real slots first, first + stride, ... of the visit that begins at slot `base`.
  template <int kSlots, typename acc_t>
  __device__ __forceinline__ void read(int64_t base, int32_t first, int stride,
                                       const Slot<acc_t> (&slots)[kSlots],
                                       int32_t (&codes)[kSlots]) const {
    if (data == nullptr) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) codes[i] = first + i * stride;
    } else if (wide) {
      read_as<int64_t>(base + first, stride, slots, codes);
    } else {
      read_as<int32_t>(base + first, stride, slots, codes);
    }
  }

  template <typename code_t, int kSlots, typename acc_t>
  __device__ __forceinline__ void read_as(int64_t first, int stride,
                                          const Slot<acc_t> (&slots)[kSlots],
                                          int32_t (&codes)[kSlots]) const {
    const auto* from = static_cast<const code_t*>(data) + first;
    code_t raw[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) raw[i] = slots[i].real ? from[i * stride] : code_t(0);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const auto code = static_cast<int64_t>(raw[i]);
      require(!slots[i].real || (code >= 0 && code < vocabulary));
      codes[i] = static_cast<int32_t>(code);
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Sources of visits. A visit may be divided into several parts, one per group of lanes.

constexpr int kStagedPerLane = 8;

// Codes in shared memory, seen by the lanes of one group.
template <typename acc_t>
struct Staged {
  int32_t* codes;
  acc_t* weights;
};

// What of a visit is still to be staged: positions counted from the visit's first slot.
template <typename acc_t>
struct Cursor {
  int64_t base;
  int32_t next;
  int32_t end;
  acc_t weight_seen;  // of this lane's slots
};

// Parts of a visit: a power of two, next to each other in their block.
struct Part {
  int index;
  int log2;

  __device__ Part(const Lanes& lanes, int log2_)
      : index(lanes.group() & ((1 << log2_) - 1)), log2(log2_) {}
  __device__ Part() : index(0), log2(0) {}

  __device__ int count() const { return 1 << log2; }
  __device__ int32_t begin(int64_t size) const {
    return static_cast<int32_t>(size * index >> log2);
  }
  __device__ int32_t end(int64_t size) const {
    return static_cast<int32_t>(size * (index + 1) >> log2);
  }
};

template <typename acc_t_>
struct PaddedVisits {
  using acc_t = acc_t_;

  SlotCodes codes;
  Mask mask;
  int32_t n_slots;
  bool mean;

  __device__ Cursor<acc_t> open(int64_t visit, const Part& part, const Lanes&) const {
    return {visit * n_slots, part.begin(n_slots), part.end(n_slots), acc_t(0)};
  }

  // Fills the staging memory with the real slots that come next; how many, in every lane.
  __device__ int stage(Cursor<acc_t>& cursor, const Staged<acc_t>& staged,
                       const Lanes& lanes) const {
    constexpr int kSlots = 4;
    int count = 0;
    while (cursor.next < cursor.end && count <= (kStagedPerLane - kSlots) * lanes.count) {
      Slot<acc_t> slots[kSlots];
      int32_t read[kSlots];
      const int32_t first = cursor.next + lanes.lane;
      mask.read(cursor.base + first, lanes.count, cursor.end - first, slots);
      codes.read(cursor.base, first, lanes.count, slots, read);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const unsigned real = lanes.vote(slots[i].real);
        if (slots[i].real) {
          const int at = count + __popc(real & lanes.earlier());
          staged.codes[at] = read[i];
          staged.weights[at] = slots[i].weight;
          cursor.weight_seen += slots[i].weight;
        }
        count += __popc(real);
      }
      cursor.next += kSlots * lanes.count;
    }
    return count;
  }

  __device__ acc_t weight(const Staged<acc_t>& staged, int at) const { return staged.weights[at]; }
  // The weights seen by all lanes of the part.
  __device__ acc_t total(const Cursor<acc_t>& cursor, const Lanes& lanes) const {
    return lanes.sum(cursor.weight_seen);
  }
  __device__ acc_t scale(acc_t total) const { return mean ? mean_scale(total) : acc_t(1); }
  __device__ void keep_total(int64_t, acc_t) const {}
  // Rows are counted from here: a visit's own embeddings, or one table for all.
  __device__ int64_t first_row(int64_t visit) const {
    return codes.data == nullptr ? visit * n_slots : 0;
  }
};

struct PackedCodes {
  const int32_t* codes;
  const int32_t* offsets;
  int64_t n_codes;
  int64_t vocabulary;

  template <typename acc_t>
  __device__ Cursor<acc_t> open(int64_t visit, const Part& part) const {
    const int64_t begin = offsets[visit];
    const int64_t end = offsets[visit + 1];
    require(begin >= 0 && begin <= end && end <= n_codes);
    return {begin, part.begin(end - begin), part.end(end - begin), acc_t(0)};
  }

  __device__ __forceinline__ int32_t at(int64_t position) const {
    const int32_t code = codes[position];
    require(code >= 0 && code < vocabulary);
    return code;
  }
};

template <typename acc_t>
__device__ __forceinline__ int staging_count(const Cursor<acc_t>& cursor, const Lanes& lanes) {
  const int32_t left = cursor.end - cursor.next;
  const int32_t most = kStagedPerLane * lanes.count;
  return left < most ? left : most;
}

template <typename acc_t_>
struct PackedVisits {
  using acc_t = acc_t_;

  PackedCodes packed;
  bool mean;

  __device__ Cursor<acc_t> open(int64_t visit, const Part& part, const Lanes&) const {
    auto cursor = packed.open<acc_t>(visit, part);
    cursor.weight_seen = static_cast<acc_t>(cursor.end - cursor.next);
    return cursor;
  }

  __device__ int stage(Cursor<acc_t>& cursor, const Staged<acc_t>& staged,
                       const Lanes& lanes) const {
    const int count = staging_count(cursor, lanes);
#pragma unroll 4
    for (int at = lanes.lane; at < count; at += lanes.count) {
      staged.codes[at] = packed.at(cursor.base + cursor.next + at);
    }
    cursor.next += count;
    return count;
  }

  __device__ acc_t weight(const Staged<acc_t>&, int) const { return acc_t(1); }
  __device__ acc_t total(const Cursor<acc_t>& cursor, const Lanes&) const {
    return cursor.weight_seen;
  }
  __device__ acc_t scale(acc_t total) const { return mean ? mean_scale(total) : acc_t(1); }
  __device__ void keep_total(int64_t, acc_t) const {}
  __device__ int64_t first_row(int64_t) const { return 0; }
};

// The codes of a visit with weights of their own; one of zero leaves its code out.
template <typename acc_t_>
struct WeightedVisits {
  using acc_t = acc_t_;

  PackedCodes packed;
  const acc_t* weights;
  acc_t* totals;  // null in mode sum

  __device__ Cursor<acc_t> open(int64_t visit, const Part& part, const Lanes&) const {
    return packed.open<acc_t>(visit, part);
  }

  __device__ int stage(Cursor<acc_t>& cursor, const Staged<acc_t>& staged,
                       const Lanes& lanes) const {
    constexpr int kSlots = 4;
    int count = 0;
    while (cursor.next < cursor.end && count <= (kStagedPerLane - kSlots) * lanes.count) {
      const int64_t first = cursor.base + cursor.next + lanes.lane;
      const int32_t left = cursor.end - cursor.next - lanes.lane;
      acc_t read[kSlots];
      int32_t codes[kSlots];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const bool exists = i * lanes.count < left;
        read[i] = exists ? weights[first + i * lanes.count] : acc_t(0);
        codes[i] = exists ? packed.at(first + i * lanes.count) : 0;
      }
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const bool counts = !(read[i] == acc_t(0));
        const unsigned real = lanes.vote(counts);
        if (counts) {
          const int at = count + __popc(real & lanes.earlier());
          staged.codes[at] = codes[i];
          staged.weights[at] = read[i];
          cursor.weight_seen += read[i];
        }
        count += __popc(real);
      }
      cursor.next += kSlots * lanes.count;
    }
    return count;
  }

  __device__ acc_t weight(const Staged<acc_t>& staged, int at) const { return staged.weights[at]; }
  __device__ acc_t total(const Cursor<acc_t>& cursor, const Lanes& lanes) const {
    return lanes.sum(cursor.weight_seen);
  }
  __device__ acc_t scale(acc_t total) const {
    return totals != nullptr ? mean_scale(total) : acc_t(1);
  }
  __device__ void keep_total(int64_t visit, acc_t total) const {
    if (totals != nullptr) totals[visit] = total;
  }
  __device__ int64_t first_row(int64_t) const { return 0; }
};

// Softmax statistics of a visit's scores: attention is exp(score - highest) * inverse, with inverse
// = 1 / (sum of exponentials). Not one log-sum-exp: added to a large score, the logarithm of the
// sum would be rounded away.
struct SoftmaxStats {
  double highest;
  double inverse;
};

// One for each visit.
struct SoftmaxStatsArrays {
  double* highest;
  double* inverse;

  __device__ SoftmaxStats of(int64_t visit) const { return {highest[visit], inverse[visit]}; }
  __device__ void set(int64_t visit, const SoftmaxStats& stats) const {
    highest[visit] = stats.highest;
    inverse[visit] = stats.inverse;
  }
};

// exp(score - highest). The difference is taken in float64: near a score of 1,000 the rounding of a
// float would show in it.
template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t exp_below(scalar_t score, double highest) {
  return exp(static_cast<acc_t>(static_cast<double>(widen(score)) - highest));
}

template <typename acc_t, typename scalar_t>
__device__ __forceinline__ acc_t attention_of(scalar_t score, const SoftmaxStats& stats) {
  return exp_below<acc_t>(score, stats.highest) * static_cast<acc_t>(stats.inverse);
}

// The codes of a visit weighted by the softmax of their scores.
template <typename scalar_t>
struct AttentiveVisits {
  using acc_t = accumulator_t<scalar_t>;

  struct AttentionCursor : Cursor<acc_t> {
    SoftmaxStats stats;
  };

  PackedCodes packed;
  const scalar_t* scores;
  SoftmaxStatsArrays visit_stats;

  // Of the scores of the whole visit, whichever part this is; {-inf, 1} without codes. A NaN
  // among the scores makes `inverse` one.
  __device__ SoftmaxStats softmax_stats_of(const Cursor<acc_t>& visit, const Lanes& lanes) const {
    double highest = -INFINITY;
    for (int64_t at = lanes.lane; at < visit.end; at += lanes.count) {
      highest = fmax(highest, static_cast<double>(widen(scores[packed.at(visit.base + at)])));
    }
    highest = lanes.largest(highest);
    double total = 0;
    for (int64_t at = lanes.lane; at < visit.end; at += lanes.count) {
      total += exp_below<acc_t>(scores[packed.at(visit.base + at)], highest);
    }
    total = lanes.sum(total);
    return {highest, total == 0 ? 1 : 1 / total};
  }

  __device__ AttentionCursor open(int64_t visit, const Part& part, const Lanes& lanes) const {
    const SoftmaxStats stats = softmax_stats_of(packed.open<acc_t>(visit, Part()), lanes);
    if (part.index == 0 && lanes.lane == 0 && blockIdx.y == 0) visit_stats.set(visit, stats);
    return {packed.open<acc_t>(visit, part), stats};
  }

  __device__ int stage(AttentionCursor& cursor, const Staged<acc_t>& staged,
                       const Lanes& lanes) const {
    const int count = staging_count(cursor, lanes);
#pragma unroll 4
    for (int at = lanes.lane; at < count; at += lanes.count) {
      const int32_t code = packed.at(cursor.base + cursor.next + at);
      staged.codes[at] = code;
      staged.weights[at] = attention_of<acc_t>(scores[code], cursor.stats);
    }
    cursor.next += count;
    return count;
  }

  __device__ acc_t weight(const Staged<acc_t>& staged, int at) const { return staged.weights[at]; }
  __device__ acc_t total(const Cursor<acc_t>&, const Lanes&) const { return acc_t(1); }
  __device__ acc_t scale(acc_t) const { return acc_t(1); }
  __device__ void keep_total(int64_t, acc_t) const {}
  __device__ int64_t first_row(int64_t) const { return 0; }
};

}  // namespace ehrseq::cuda
