// Checks of the raw operators' options, alike on the CPU and on a GPU.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/checks.h"

namespace ehrseq::survival {

constexpr int64_t kSoftmaxLink = 2;

inline void check_options(const char* operation, bool competing, int64_t link, double eps,
                          int64_t reduction) {
  expect_option(link, operation, "link", 0, competing ? kSoftmaxLink : 1);
  expect_option(reduction, operation, "reduction", 0, 2);
  if (!(eps >= 0 && eps < 0.5)) refuse(operation, "eps", "in [0, 0.5)", std::to_string(eps));
}

inline int64_t causes_of(int64_t classes, int64_t link) {
  const int64_t causes = link == kSoftmaxLink ? classes - 1 : classes;
  if (causes < 1) throw std::invalid_argument("hazards: expected at least one cause");
  return causes;
}

// Positions within a patient's row are 32 bits wide.
inline void check_row_length(int64_t slots, int64_t classes) {
  if (slots > std::numeric_limits<int32_t>::max() / classes) {
    throw std::invalid_argument("hazards: a patient's row has more than 2^31 - 1 values");
  }
}

}  // namespace ehrseq::survival
