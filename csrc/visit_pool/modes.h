#pragma once

#include <cstdint>

namespace ehrseq {

// As in ehrseq_fast/visit_pool/op.py.
enum Mode : int64_t { kMean = 0, kSum = 1, kMax = 2 };

constexpr int64_t kTileVisits = 64;  // visits whose real slots are collected before they are pooled

}  // namespace ehrseq
