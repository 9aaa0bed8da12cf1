#include "visit_pool/slots.h"

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define EHRSEQ_ISA_FILE "visit_pool/slot_kernels.h"
#include "common/each_isa.h"

namespace ehrseq {

template <typename mask_t>
int64_t find_set(const mask_t* mask, int64_t count, int32_t first, int32_t* positions) {
  using read_t = std::conditional_t<std::is_same_v<mask_t, bool>, uint8_t, mask_t>;
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::pooling, find_set<read_t>);
  return kernel(reinterpret_cast<const read_t*>(mask), count, first, positions);
}

template int64_t find_set(const bool*, int64_t, int32_t, int32_t*);
template int64_t find_set(const uint8_t*, int64_t, int32_t, int32_t*);
template int64_t find_set(const int32_t*, int64_t, int32_t, int32_t*);
template int64_t find_set(const int64_t*, int64_t, int32_t, int32_t*);
template int64_t find_set(const float*, int64_t, int32_t, int32_t*);
template int64_t find_set(const double*, int64_t, int32_t, int32_t*);

template <typename code_t>
int64_t find_others(const code_t* codes, int64_t count, code_t value, int32_t first,
                    int32_t* positions) {
  static const auto kernel = EHRSEQ_BEST_ISA(ehrseq::pooling, find_others<code_t>);
  return kernel(codes, count, value, first, positions);
}

template int64_t find_others(const int32_t*, int64_t, int32_t, int32_t, int32_t*);
template int64_t find_others(const int64_t*, int64_t, int64_t, int32_t, int32_t*);

}  // namespace ehrseq
