// The kernels of the packed LSTM, compiled for several instruction sets.
#include "packed_lstm/cell.h"

#define EHRSEQ_OPERATION packed_lstm
#define EHRSEQ_GATES "packed_lstm/gates.h"
#include "common/recurrent/each_isa.h"
