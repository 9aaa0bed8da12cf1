// All kernels, for one instruction set. A kernels_*.cpp includes the headers that must stay apart
// from it, switches the compiler to its instruction set, names it, and includes this.
// (target_clones cannot serve here: GCC takes wide vectors apart before it clones.)
//   EHRSEQ_ISA           namespace
//   EHRSEQ_VECTOR_BYTES  width of a vector
//   EHRSEQ_TILE_ROWS     rows of a tile: with four vectors side by side, their sums, factors and
//   one
//                        weight fill the registers

#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"

namespace ehrseq::packed_lstm::EHRSEQ_ISA {

#include "packed_lstm/tile.h"
// Order matters from here on: each builds on those before.
#include "packed_lstm/activations.h"
#include "packed_lstm/panels.h"
#include "packed_lstm/scan_backward.h"
#include "packed_lstm/scan_forward.h"
#include "packed_lstm/weight_gradient.h"

template <typename T>
Kernels<T> table() {
  return {kLanes<T>,          EHRSEQ_TILE_ROWS,    pack_gate_panels<T>, pack_column_panels<T>,
          project_inputs<T>,  scan_patients<T>,    scan_units<T>,       scan_patients_back<T>,
          scan_units_back<T>, hand_back_hidden<T>, grad_input<T>,       add_to_weights<T>,
          finish_weights<T>,  padded_factors<T>};
}

const Kernels<float>& float_kernels() {
  static const Kernels<float> kernels = table<float>();
  return kernels;
}

const Kernels<double>& double_kernels() {
  static const Kernels<double> kernels = table<double>();
  return kernels;
}

}  // namespace ehrseq::packed_lstm::EHRSEQ_ISA
