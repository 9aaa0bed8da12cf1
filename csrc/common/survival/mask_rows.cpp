#include "common/survival/mask_rows.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#define EHRSEQ_ISA_FILE "common/survival/mask_kernels.h"
#include "common/each_isa.h"

namespace ehrseq::survival {

template <typename Values>
void count_visits(const void* mask, int64_t row_stride, int64_t slots, int64_t rows,
                  int64_t* visits) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::survival, count_in_rows<Values>);
  kernel(mask, row_stride, slots, rows, visits);
}

#define EHRSEQ_COUNT_VISITS(Values) \
  template void count_visits<Values>(const void*, int64_t, int64_t, int64_t, int64_t*);

EHRSEQ_COUNT_VISITS(BoolMask)
EHRSEQ_COUNT_VISITS(Int8Mask)
EHRSEQ_COUNT_VISITS(Int16Mask)
EHRSEQ_COUNT_VISITS(Int32Mask)
EHRSEQ_COUNT_VISITS(Int64Mask)
EHRSEQ_COUNT_VISITS(HalfMask)
EHRSEQ_COUNT_VISITS(BFloat16Mask)
EHRSEQ_COUNT_VISITS(FloatMask)
EHRSEQ_COUNT_VISITS(DoubleMask)

#undef EHRSEQ_COUNT_VISITS

}  // namespace ehrseq::survival
