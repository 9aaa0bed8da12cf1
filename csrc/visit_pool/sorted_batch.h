// Padded batches on the GPU: their masks, and their transposed index, built on the device.
#pragma once

#include <algorithm>
#include <vector>

#include "visit_pool/arguments.h"
#include "visit_pool/cuda_launch.h"

namespace ehrseq::cuda {

// ---------------------------------------------------------------------------------------------
// Input validation, and masks as kernels read them

inline Mask mask_of(const OptionalTensor& mask) {
  if (!mask.has_value()) return {nullptr, MaskKind::kNone};
  const void* data = mask->const_data_ptr();
  switch (mask->scalar_type()) {
    case ScalarType::Bool:
      return {data, MaskKind::kBool};
    case ScalarType::Byte:
      return {data, MaskKind::kByte};
    case ScalarType::Int:
      return {data, MaskKind::kInt};
    case ScalarType::Long:
      return {data, MaskKind::kLong};
    case ScalarType::Float:
      return {data, MaskKind::kFloat};
    case ScalarType::Double:
      return {data, MaskKind::kDouble};
    default:
      throw std::invalid_argument(
          "visit_pool: mask: expected bool, uint8, int32, int64, float32 or float64, got " +
          as_text(mask->scalar_type()));
  }
}

inline bool is_weighted(const Mask& mask) {
  return mask.kind != MaskKind::kNone && mask.kind != MaskKind::kBool;
}

// Kernels count the slots of a visit in 32 bits, a few steps beyond the last.
inline int32_t slots_of_a_visit(int64_t n_slots) {
  if (n_slots > INT32_MAX - 1024) {
    refuse("visit_pool", "slots per visit", "at most 2^31-1025", std::to_string(n_slots));
  }
  return static_cast<int32_t>(n_slots);
}

struct PaddedBatch {
  Tensor codes_tensor;
  OptionalTensor mask_tensor;
  SlotCodes codes;
  Mask mask;
  std::vector<int64_t> visits_shape;
  int64_t n_visits;
  int32_t n_slots;

  PaddedBatch(const Tensor& codes_, const OptionalTensor& mask_, int64_t vocabulary)
      : codes_tensor(made_contiguous(codes_)),
        mask_tensor(contiguous_or_none(mask_)),
        codes{codes_tensor.const_data_ptr(), codes_tensor.scalar_type() == ScalarType::Long,
              vocabulary},
        mask(mask_of(mask_tensor)),
        visits_shape(leading_shape(codes_tensor, 1)),
        n_visits(product(visits_shape)),
        n_slots(slots_of_a_visit(codes_tensor.size(codes_tensor.dim() - 1))) {}
};

// How long a padded visit may turn out to be: most slots are empty.
constexpr int64_t kSlotsPerCode = 8;

// ---------------------------------------------------------------------------------------------
// The index

inline int bits_of(int64_t vocabulary) {
  int bits = 1;
  while ((int64_t{1} << bits) < vocabulary) ++bits;
  return bits;
}

// The real slots of a padded batch, sorted by code.
template <typename acc_t>
class SortedBatch {
 public:
  SortedBatch(const PaddedBatch& batch, int64_t mode, int64_t padding_code, const Tensor& like,
              cudaStream_t stream)
      : n_slots_in_all_(batch.n_visits * batch.n_slots), stream_(stream) {
    if (n_slots_in_all_ > INT32_MAX) {
      refuse("visit_pool_backward", "slots of all visits", "at most 2^31-1",
             std::to_string(n_slots_in_all_));
    }
    const int bits = bits_of(batch.codes.vocabulary);
    const int passes = (bits + kMostDigitBits - 1) / kMostDigitBits;
    const int digit_bits = (bits + passes - 1) / passes;
    const bool weighted = mode != kMax && is_weighted(batch.mask);
    const bool scaled = mode == kMean && batch.mask.kind != MaskKind::kNone;
    if (mode == kMean && !scaled) {
      constant_ = acc_t(1) / static_cast<acc_t>(std::max(batch.n_slots, 1));
    }
    reserve(batch.n_visits, 1 << digit_bits, weighted, scaled, passes > 1);
    scratch_.allocate(like);

    const PaddedKeys<acc_t> slots{batch.codes, batch.mask, static_cast<uint32_t>(batch.n_slots),
                                  n_slots_in_all_, padding_code};
    sort_slots(slots, {0, digit_bits}, batch.n_visits, scaled, weighted);
    for (int pass = 1; pass < passes; ++pass) {
      sort_again({pass * digit_bits, digit_bits}, weighted, (pass - 1) % 2, pass % 2);
    }
    sorted_ = entries((passes - 1) % 2, weighted);
    scales_ = scaled ? scratch_.at<acc_t>(scales_at_) : nullptr;
  }

  const int32_t* count() const { return scratch_.at<int32_t>(count_at_); }
  int64_t most_entries() const { return n_slots_in_all_; }
  SortedIndex<acc_t> index() const { return {sorted_, count()}; }
  EntryWeights<acc_t> weights() const { return {constant_, nullptr, scales_, sorted_.weights}; }

  const int32_t* visits() const { return sorted_.visits; }

  // The distinct codes and where each begins, as packed batches have them, by 3 launches; and how
  // many codes and entries there are.
  void write_distinct(int32_t* index_codes, int32_t* index_offsets, int32_t* n_distinct,
                      int32_t* n_entries) const {
    const SortedKeys<acc_t> keys{sorted_, count()};
    auto* counts = scratch_.at<int32_t>(counts_at_);
    launch(count_distinct<acc_t>, blocks(dense_tiles()), kSortThreads, 0, stream_, keys, counts);
    launch(sum_over_tiles<SortedKeys<acc_t>>, 1, kSortThreads, 0, stream_, keys, dense_tiles(),
           counts, n_distinct);
    launch(write_index<acc_t>, blocks(dense_tiles()), kSortThreads, 0, stream_, keys, counts,
           n_distinct, index_codes, index_offsets, n_entries);
  }

 private:
  int64_t tiles(int64_t size) const { return (n_slots_in_all_ + size - 1) / size; }
  int64_t slot_tiles() const { return tiles(PaddedKeys<acc_t>::kTile); }
  int64_t dense_tiles() const { return tiles(SortedKeys<acc_t>::kTile); }
  unsigned blocks(int64_t n_tiles) const { return blocks_for(n_tiles, kSortWarps); }

  // Two buffers where there is more than one pass: it reads one and writes the other.
  void reserve(int64_t n_visits, int64_t digits, bool weighted, bool scaled, bool two) {
    const int64_t n_tiles = two ? dense_tiles() : slot_tiles();
    counts_at_ = scratch_.reserve<int32_t>(std::max(digits * n_tiles, dense_tiles()));
    totals_at_ = scratch_.reserve<int32_t>(digits);
    count_at_ = scratch_.reserve<int32_t>(1);
    if (scaled) scales_at_ = scratch_.reserve<acc_t>(n_visits);
    for (int buffer = 0; buffer < (two ? 2 : 1); ++buffer) {
      codes_at_[buffer] = scratch_.reserve<int32_t>(n_slots_in_all_);
      visits_at_[buffer] = scratch_.reserve<int32_t>(n_slots_in_all_);
      if (weighted) weights_at_[buffer] = scratch_.reserve<acc_t>(n_slots_in_all_);
    }
  }

  Entries<acc_t> entries(int buffer, bool weighted) const {
    return {scratch_.at<int32_t>(codes_at_[buffer]), scratch_.at<int32_t>(visits_at_[buffer]),
            weighted ? scratch_.at<acc_t>(weights_at_[buffer]) : nullptr};
  }

  void sort_slots(const PaddedKeys<acc_t>& slots, Digit digit, int64_t n_visits, bool scaled,
                  bool weighted) {
    auto* counts = scratch_.at<int32_t>(counts_at_);
    const unsigned tile_blocks = blocks(slot_tiles());
    const unsigned visit_blocks = scaled ? blocks_for(n_visits, kSortWarps) : 0;
    launch(count_padded<acc_t>, tile_blocks + visit_blocks, kSortThreads, counter_bytes(digit),
           stream_, slots, digit, slot_tiles(), tile_blocks, n_visits, counts,
           scaled ? scratch_.at<acc_t>(scales_at_) : nullptr);
    sum_and_move(slots, digit, slot_tiles(), entries(0, weighted), scratch_.at<int32_t>(count_at_));
  }

  void sort_again(Digit digit, bool weighted, int from, int to) {
    const SortedKeys<acc_t> keys{entries(from, weighted), count()};
    launch(count_sorted<acc_t>, blocks(dense_tiles()), kSortThreads, counter_bytes(digit), stream_,
           keys, digit, dense_tiles(), scratch_.at<int32_t>(counts_at_));
    sum_and_move(keys, digit, dense_tiles(), entries(to, weighted), nullptr);
  }

  template <typename Keys>
  void sum_and_move(const Keys& keys, Digit digit, int64_t n_tiles, const Entries<acc_t>& out,
                    int32_t* count) {
    auto* counts = scratch_.at<int32_t>(counts_at_);
    auto* totals = scratch_.at<int32_t>(totals_at_);
    launch(sum_over_tiles<Keys>, static_cast<unsigned>(digit.values()), kSortThreads, 0, stream_,
           keys, n_tiles, counts, totals);
    launch(move_entries<Keys>, blocks(n_tiles), kSortThreads,
           counter_bytes(digit) + digit.values() * sizeof(int32_t), stream_, keys, digit, n_tiles,
           counts, totals, out, count);
  }

  static size_t counter_bytes(Digit digit) { return kSortWarps * digit.values() * sizeof(int32_t); }

  int64_t n_slots_in_all_;
  cudaStream_t stream_;
  Scratch scratch_;
  int64_t counts_at_ = 0;
  int64_t totals_at_ = 0;
  int64_t count_at_ = 0;
  int64_t scales_at_ = 0;
  int64_t codes_at_[2] = {};
  int64_t visits_at_[2] = {};
  int64_t weights_at_[2] = {};
  Entries<acc_t> sorted_{};
  acc_t constant_ = 1;
  const acc_t* scales_ = nullptr;
};

}  // namespace ehrseq::cuda
