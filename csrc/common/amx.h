// Products of tiles of bfloat16 (AMX): sums [rows][16] += left [rows][packs][2] x
// right [packs][16][2], in float32, for at most 16 rows and 16 packs. A pack is two neighbours
// along what is summed over.
//
// No compiler flag is needed: the instructions are inline assembly, reached only where
// bfloat16_products() (common/isa.h) says that this process may use them. In emulation the same
// calls go to a model of the tiles in memory (amx.cpp), so that every kernel above them can be
// tested on a CPU that has none.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/simd.h"

namespace ehrseq::amx_tiles {

constexpr int64_t kPacks = 16;

// Why the tiles of this CPU are not used, or null where they can be: asks the operating system for
// them, and compares products of small integers, which are exact, with plain ones. Found out once.
const char* why_not();

// From here on, for the whole process: tiles in memory. Needs AVX-512.
void emulate();
bool is_emulated();

// The tiles by use. All sums have `rows` rows; the left and right factors are full ones of kPacks
// packs, or hold the rest.
constexpr int kLeft = 4, kLeftRest = 5, kRight = 6, kRightRest = 7;

namespace detail {

extern bool in_memory;

// What the tiles of this thread are set to: none where rows is 0.
struct Shapes {
  int64_t rows, rest;
};
extern __thread Shapes shapes;  // thread_local would be read by a call

void set_shapes(int64_t rows, int64_t rest);
void release();
void emulated_load(int tile, const void* from, int64_t stride);
void emulated_store(int tile, void* to, int64_t stride);
void emulated_multiply(int sums, int left, int right);

}  // namespace detail

// Tiles are set for as long as one of these lives, on its thread. Other libraries that use them do
// so before or after, and find them released.
class Session {
 public:
  Session() { detail::shapes = {0, 0}; }
  ~Session() {
    if (detail::shapes.rows > 0) detail::release();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// Clears the tiles where their shapes change.
inline void set_shapes(int64_t rows, int64_t rest) {
  if (detail::shapes.rows != rows || detail::shapes.rest != rest) detail::set_shapes(rows, rest);
}

// Strides are in bytes.
template <int kTile>
EHRSEQ_INLINE void load(const void* from, int64_t stride) {
  if (detail::in_memory) return detail::emulated_load(kTile, from, stride);
#if EHRSEQ_HAS_AMX
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
#endif
}

template <int kTile>
EHRSEQ_INLINE void store(void* to, int64_t stride) {
  if (detail::in_memory) return detail::emulated_store(kTile, to, stride);
#if EHRSEQ_HAS_AMX
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
#endif
}

template <int kSums, int kLeftTile, int kRightTile>
EHRSEQ_INLINE void multiply() {
  if (detail::in_memory) return detail::emulated_multiply(kSums, kLeftTile, kRightTile);
#if EHRSEQ_HAS_AMX
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
               :
               : "i"(kSums), "i"(kLeftTile), "i"(kRightTile));
#endif
}

}  // namespace ehrseq::amx_tiles
