// The GRU as common/recurrent/ knows it (see layer.h there).
#pragma once

#include "common/recurrent/layer.h"

namespace ehrseq::packed_gru {

using namespace recurrent;

struct Cell {
  static constexpr const char* kName = "packed_gru";
  static constexpr int64_t kGates = 3;  // r, z, n
  // The reset gate scales what n takes from the hidden state, not what it takes from the inputs:
  // those are the last two sums.
  static constexpr int64_t kSums = 4;
  static constexpr int64_t kOfInputs[kGates] = {0, 1, 2};
  static constexpr int64_t kOfHidden[kGates] = {0, 1, 3};
  static constexpr bool kHasCellState = false;

  template <typename S>
  static const Kernels<S>& kernels();
};

}  // namespace ehrseq::packed_gru
