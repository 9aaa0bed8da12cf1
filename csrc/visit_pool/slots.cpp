#include "visit_pool/slots.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#define EHRSEQ_ISA_FILE "visit_pool/slot_kernels.h"
#include "common/each_isa.h"

namespace ehrseq {

int64_t find_set_bytes(const uint8_t* bytes, int64_t count, int32_t first, int32_t* positions) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::pooling, find_set_bytes);
  return kernel(bytes, count, first, positions);
}

}  // namespace ehrseq
