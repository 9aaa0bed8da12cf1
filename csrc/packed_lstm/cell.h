// The LSTM as common/recurrent/ knows it (see layer.h there).
#pragma once

#include "common/recurrent/layer.h"

namespace ehrseq::packed_lstm {

using namespace recurrent;

struct Cell {
  static constexpr const char* kName = "packed_lstm";
  static constexpr int64_t kGates = 4;  // i, f, g, o
  static constexpr int64_t kSums = 4;
  static constexpr int64_t kOfInputs[kGates] = {0, 1, 2, 3};
  static constexpr int64_t kOfHidden[kGates] = {0, 1, 2, 3};
  static constexpr bool kHasCellState = true;

  template <typename S>
  static const Kernels<S>& kernels();
};

}  // namespace ehrseq::packed_lstm
