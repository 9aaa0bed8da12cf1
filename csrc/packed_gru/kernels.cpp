// The kernels of the packed GRU, compiled for several instruction sets.
#include "packed_gru/cell.h"

#define EHRSEQ_OPERATION packed_gru
#define EHRSEQ_GATES "packed_gru/gates.h"
#include "common/recurrent/each_isa.h"
