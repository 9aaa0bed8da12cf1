// All kernels of one cell, for one instruction set (see common/each_isa.h): common/recurrent/
// each_isa.h includes this once for each.

#if EHRSEQ_ISA_LEVEL >= 2
#define EHRSEQ_VECTOR_BYTES 64
#define EHRSEQ_TILE_ROWS 6
#elif EHRSEQ_ISA_LEVEL == 1
#define EHRSEQ_VECTOR_BYTES 32
#define EHRSEQ_TILE_ROWS 3
#else
#define EHRSEQ_VECTOR_BYTES 16
#define EHRSEQ_TILE_ROWS 2
#endif
#if EHRSEQ_ISA_LEVEL == 3
#define EHRSEQ_BFLOAT16_DOTS
#endif

namespace ehrseq::EHRSEQ_OPERATION::EHRSEQ_ISA {

constexpr int64_t kGates = Cell::kGates;
constexpr int64_t kSums = Cell::kSums;
constexpr const int64_t (&kOfInputs)[kGates] = Cell::kOfInputs;
constexpr const int64_t (&kOfHidden)[kGates] = Cell::kOfHidden;

#include "common/tile.h"
// Order matters from here on: each builds on those before.
#include "common/activations.h"

// What a visit gives to the next one; the hidden state is also its output.
template <typename S>
struct States {
  Vector<Sum<S>> carried, hidden;
};

#include EHRSEQ_GATES
#include "common/recurrent/panels.h"
#include "common/recurrent/scan_backward.h"
#include "common/recurrent/scan_forward.h"
#include "common/recurrent/weight_gradient.h"

#include "common/recurrent/recompute.h"

template <typename S>
Kernels<S> table() {
  return {kLanes<S>,          EHRSEQ_TILE_ROWS,    pack_gate_panels<S>, pack_column_panels<S>,
          project_inputs<S>,  scan_patients<S>,    scan_units<S>,       scan_patients_back<S>,
          scan_units_back<S>, hand_back_hidden<S>, grad_input<S>,       add_to_weights<S>,
          finish_weights<S>,  padded_factors<S>,   recompute_gates<S>};
}

#ifdef EHRSEQ_BFLOAT16_DOTS
inline const Kernels<BFloat16>& bfloat16_kernels() {
  static const Kernels<BFloat16> kernels = table<BFloat16>();
  return kernels;
}
#else
inline const Kernels<float>& float_kernels() {
  static const Kernels<float> kernels = table<float>();
  return kernels;
}

inline const Kernels<double>& double_kernels() {
  static const Kernels<double> kernels = table<double>();
  return kernels;
}
#endif

}  // namespace ehrseq::EHRSEQ_OPERATION::EHRSEQ_ISA

#undef EHRSEQ_VECTOR_BYTES
#undef EHRSEQ_TILE_ROWS
#undef EHRSEQ_BFLOAT16_DOTS
