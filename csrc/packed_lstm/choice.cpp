// Which kernels run on this CPU.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "common/isa.h"
#include "packed_lstm/isa.h"

namespace ehrseq::packed_lstm {

#ifdef EHRSEQ_HAS_X86_KERNELS
template <>
const Kernels<float>& kernels<float>() {
  if (best_isa() >= Isa::kAvx512) return avx512::float_kernels();
  if (best_isa() == Isa::kAvx2) return avx2::float_kernels();
  return baseline::float_kernels();
}

template <>
const Kernels<double>& kernels<double>() {
  if (best_isa() >= Isa::kAvx512) return avx512::double_kernels();
  if (best_isa() == Isa::kAvx2) return avx2::double_kernels();
  return baseline::double_kernels();
}

template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return avx512_bf16::bfloat16_kernels();
}
#else
template <>
const Kernels<float>& kernels<float>() {
  return baseline::float_kernels();
}

template <>
const Kernels<double>& kernels<double>() {
  return baseline::double_kernels();
}

template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  throw std::logic_error("packed_lstm: no bfloat16 kernels on this CPU");
}
#endif

// Having AVX512-BF16 says that a CPU can multiply pairs of bfloat16, not that this is fast: AMD's
// start as many such instructions per cycle as FMAs, each for twice the products; Intel's half as
// many or fewer, so that nothing is gained, and the conversions come on top. There bfloat16 is
// widened to float32, unless EHRSEQ_FAST_CPU_CAPABILITY=avx512_bf16 asks for these kernels.
bool has_bfloat16_kernels() {
#ifdef EHRSEQ_HAS_X86_KERNELS
  static const char* const asked = std::getenv("EHRSEQ_FAST_CPU_CAPABILITY");
  static const bool is_wanted = asked != nullptr && std::strcmp(asked, "avx512_bf16") == 0;
  return best_isa() == Isa::kAvx512Bf16 && (is_wanted || __builtin_cpu_is("amd"));
#else
  return false;
#endif
}

}  // namespace ehrseq::packed_lstm
