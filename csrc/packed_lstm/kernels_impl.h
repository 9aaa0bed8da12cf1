// All kernels, for one instruction set. A kernels_*.cpp includes the headers that must stay apart
// from it, switches the compiler to its instruction set, names it, and includes this.
// (target_clones cannot serve here: GCC takes wide vectors apart before it clones.)
//   EHRSEQ_ISA           namespace
//   EHRSEQ_VECTOR_BYTES  width of a vector
//   EHRSEQ_TILE_ROWS     rows of a tile: four vectors side by side and their factors fill the
//                        registers
//   EHRSEQ_BFLOAT16_DOTS   defined where products are those of bfloat16 pairs (AVX512-BF16)

#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace ehrseq::packed_lstm::EHRSEQ_ISA {

#include "common/tile.h"
// Order matters from here on: each builds on those before.
#include "common/activations.h"
#include "packed_lstm/gates.h"
#include "packed_lstm/panels.h"
#include "packed_lstm/scan_backward.h"
#include "packed_lstm/scan_forward.h"
#include "packed_lstm/weight_gradient.h"

#include "packed_lstm/recompute.h"

template <typename S>
Kernels<S> table() {
  return {kLanes<S>,          EHRSEQ_TILE_ROWS,    pack_gate_panels<S>, pack_column_panels<S>,
          project_inputs<S>,  scan_patients<S>,    scan_units<S>,       scan_patients_back<S>,
          scan_units_back<S>, hand_back_hidden<S>, grad_input<S>,       add_to_weights<S>,
          finish_weights<S>,  padded_factors<S>,   recompute_gates<S>};
}

#ifdef EHRSEQ_BFLOAT16_DOTS
const Kernels<BFloat16>& bfloat16_kernels() {
  static const Kernels<BFloat16> kernels = table<BFloat16>();
  return kernels;
}
#else
const Kernels<float>& float_kernels() {
  static const Kernels<float> kernels = table<float>();
  return kernels;
}

const Kernels<double>& double_kernels() {
  static const Kernels<double> kernels = table<double>();
  return kernels;
}
#endif

}  // namespace ehrseq::packed_lstm::EHRSEQ_ISA
