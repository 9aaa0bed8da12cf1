// Options that operators take as numbers, as the schemas list them; for the CPU and CUDA alike.
// Free of torch headers.
#pragma once

#include <cstdint>

namespace ehrseq {

// How visit pooling combines the codes of a visit.
enum Mode : int64_t { kMean = 0, kSum = 1, kMax = 2 };

// What the hazards of a survival loss are.
enum class Link : int64_t { kProbabilities = 0, kSigmoid = 1, kSoftmax = 2, kCloglog = 3 };

// How a survival loss combines patients.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

}  // namespace ehrseq
