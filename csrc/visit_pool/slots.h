// Finds the slots that a mask keeps, or a code is not in, compiled for each instruction set
// (slot_kernels.h).
#pragma once

#include <cstdint>

namespace ehrseq {

// The positions of the numbers that are not 0 (so that a NaN counts, and -0 does not), ascending,
// each with `first` added. There has to be room for `count` of them and 4 more. Returns how many
// there are. For the types of masks; a bool is read as the byte that it is.
template <typename mask_t>
int64_t find_set(const mask_t* mask, int64_t count, int32_t first, int32_t* positions);

// The same of the numbers that are not `value`, of the types of codes.
template <typename code_t>
int64_t find_others(const code_t* codes, int64_t count, code_t value, int32_t first,
                    int32_t* positions);

}  // namespace ehrseq
