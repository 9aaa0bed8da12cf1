// All kernels of one cell, for one instruction set (see common/each_isa.h): common/recurrent/
// each_isa.h includes this once for each.

#if EHRSEQ_ISA_LEVEL == 4
#define EHRSEQ_VECTOR_BYTES 64
#define EHRSEQ_TILE_ROWS 16
#elif EHRSEQ_ISA_LEVEL >= 2
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
#elif EHRSEQ_ISA_LEVEL == 4
#define EHRSEQ_BFLOAT16_TILES
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

// A kernel, with what its products need around it.
template <auto kKernel>
struct WithProducts;

template <typename... Args, void (*kKernel)(Args...)>
struct WithProducts<kKernel> {
  static void run(Args... args) {
    [[maybe_unused]] const ProductSession session;
    kKernel(args...);
  }
};

template <auto kKernel>
constexpr auto with_products = WithProducts<kKernel>::run;

template <typename S>
Kernels<S> table() {
  return {kLanes<S>,
          EHRSEQ_TILE_ROWS,
          with_products<pack_gate_panels<S>>,
          pack_column_panels<S>,
          with_products<project_inputs<S>>,
          with_products<scan_patients<S>>,
          with_products<scan_units<S>>,
          with_products<scan_patients_back<S>>,
          with_products<scan_units_back<S>>,
          with_products<hand_back_hidden<S>>,
          with_products<grad_input<S>>,
          with_products<add_to_weights<S>>,
          finish_weights<S>,
          padded_factors<S>,
          with_products<recompute_gates<S>>};
}

#if defined(EHRSEQ_BFLOAT16_DOTS) || defined(EHRSEQ_BFLOAT16_TILES)
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
#undef EHRSEQ_BFLOAT16_TILES
