// What the CPU kernels of masked_bce compute: slots in the order of memory, in blocks of 64, whose
// weights other than 0 are the bits of a word.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/survival/saved_grad.h"

namespace ehrseq::fixed_horizon {

using survival::saved_grad_t;

constexpr int64_t kBlockSlots = 64;
constexpr int64_t kChunkSlots = 2048;  // of which there is one sum

// What kernels read as it is stored; numbers of other dtypes are made doubles before.
enum class Stored { kBool, kLong, kFloat, kDouble };

struct Numbers {
  Stored stored;
  const void* data;
};

// Of `slots` weights their sum. Sets the words of all blocks; *possible becomes false where a
// weight is negative.
double read_weights(const Numbers& weights, int64_t slots, uint64_t* words, bool* possible);

template <typename scalar_t>
struct GivenSlots {
  const scalar_t* logits;
  Numbers labels;
  Numbers weights;
  const uint64_t* words;
  saved_grad_t<scalar_t>* grad;  // null where no gradient is needed
  int64_t slots;                 // of this chunk
  int64_t slots_left;            // from the first one on, whose logits may be prefetched
  bool reads_labels_ahead;       // whether their labels may
};

// The sum of the weighted terms; the gradient of `share` times that, zeros where nothing counts.
// *possible becomes false where the label of a slot that counts is outside [0, 1].
template <typename scalar_t>
double loss_of_given(const GivenSlots<scalar_t>& given, double share, bool* possible);

}  // namespace ehrseq::fixed_horizon
