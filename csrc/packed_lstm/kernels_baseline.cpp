// The kernels for any CPU: 16-byte vectors, as SSE2 and NEON have.
#include <cmath>
#include <type_traits>

#include "common/simd.h"
#include "packed_lstm/kernels.h"

#define EHRSEQ_ISA baseline
#define EHRSEQ_VECTOR_BYTES 16
#define EHRSEQ_TILE_ROWS 2
#include "packed_lstm/kernels_impl.h"
