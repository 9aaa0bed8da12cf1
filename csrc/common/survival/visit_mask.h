// How many visits each patient has: the ones of a mask that must be ones first and zeros after
// them, or, for a packed batch, numbers that are known already.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "common/tensors.h"

namespace ehrseq::survival {

constexpr int64_t kMalformed = -1;

class VisitMask {
 public:
  // A mask that expect_sequence_mask has checked. No mask: every slot is a visit.
  VisitMask(const OptionalTensor& mask, int64_t slots);

  explicit VisitMask(std::vector<int64_t> lengths) : slots_(0), lengths_(std::move(lengths)) {}

  // The numbers of visits of patients begin..end; kMalformed where the mask has a hole or a value
  // that is neither 0 nor 1.
  void count_visits(int64_t begin, int64_t end, int64_t* visits) const;

  struct Fault {
    int64_t visit;
    double value;
  };

  // The first slot that breaks a malformed mask: a value other than 0 and 1, or a 1 after a 0.
  Fault first_fault(int64_t patient) const;

 private:
  std::optional<Tensor> mask_;
  int64_t slots_;
  std::vector<int64_t> lengths_;
};

}  // namespace ehrseq::survival
