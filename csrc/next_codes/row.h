// What the CPU kernel of next_codes_bce computes of one visit: the loss over its classes, and the
// derivative by each logit, laid out as the products of a linear layer read it.
#pragma once

#include <cstdint>

namespace ehrseq::next_codes {

template <typename T>
struct Row {
  T* logits;  // [classes]; changed
  int64_t classes;
  const T* class_weight;     // [classes], or null
  const T* positive_weight;  // [classes], or null
  const int32_t* positives;  // the visit's codes, each once
  int64_t n_positives;
  T* kept;       // room for n_positives logits
  bool sampled;  // positives add nothing
  T scale;       // of the derivatives
  T* slopes;     // see linear/layer.h, unit gradients: this row's place in the first block; or null
  int64_t block_stride;
};

// The loss, unscaled.
template <typename T>
using RowKernel = double (*)(const Row<T>&);

// For the running CPU.
template <typename T>
RowKernel<T> row_kernel();

}  // namespace ehrseq::next_codes
