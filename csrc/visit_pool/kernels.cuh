// The device code of visit pooling, free of torch headers:
//   lanes.cuh               groups of lanes and their collectives
//   rows.cuh                rows of the table, a lane's share at a time; sums and maxima of them
//   sources.cuh             the codes of a visit: padded and masked, packed, with weights or with
//                           attention
//   gather.cuh              forward, and the gradient of embeddings that already exist
//   index.cuh               the transposed index of a padded batch
//   entries.cuh             the entries of either index, for the backward pass
//   gradient_rows.cuh       the rows that the backward pass reads and writes
//   chunk_sums.cuh          backward, first kernel: sums over chunks of entries
//   segment_sums.cuh        backward, second kernel: segments that cross chunk boundaries
//   attention_gradient.cuh  attention of entries, and the gradient of scores
//   weight_gradient.cuh     weights of entries, and the gradient of weights per code
#pragma once

#include "visit_pool/attention_gradient.cuh"
#include "visit_pool/chunk_sums.cuh"
#include "visit_pool/gather.cuh"
#include "visit_pool/index.cuh"
#include "visit_pool/segment_sums.cuh"
#include "visit_pool/weight_gradient.cuh"
