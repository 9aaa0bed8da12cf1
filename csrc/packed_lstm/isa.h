// Which instruction sets there are kernels for.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EHRSEQ_HAS_X86_KERNELS
#endif

#include "packed_lstm/kernels.h"

#define EHRSEQ_DECLARE_KERNELS(isa)        \
  namespace ehrseq::packed_lstm::isa {     \
  const Kernels<float>& float_kernels();   \
  const Kernels<double>& double_kernels(); \
  }

EHRSEQ_DECLARE_KERNELS(baseline)
#ifdef EHRSEQ_HAS_X86_KERNELS
EHRSEQ_DECLARE_KERNELS(avx2)
EHRSEQ_DECLARE_KERNELS(avx512)
namespace ehrseq::packed_lstm::avx512_bf16 {
const Kernels<BFloat16>& bfloat16_kernels();
}
#endif
