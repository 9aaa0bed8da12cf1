// Finds the slots that a bool mask keeps, compiled for each instruction set (slot_kernels.h).
#pragma once

#include <cstdint>

namespace ehrseq {

// The positions of the bytes that are not 0, ascending, each with `first` added. There has to be
// room for `count` of them and 4 more. Returns how many there are.
int64_t find_set_bytes(const uint8_t* bytes, int64_t count, int32_t first, int32_t* positions);

}  // namespace ehrseq
