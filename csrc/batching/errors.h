// What is wrong with a batch, where it is first wrong, and how often. The messages are the same,
// word for word, in ehrseq_fast/batch/reference.py.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace ehrseq::batching {

// What int32 offsets can count.
constexpr int64_t kMostEntries = std::numeric_limits<int32_t>::max() - 1;

inline std::string text(int64_t number) { return std::to_string(number); }

[[noreturn]] inline void refuse_value(const std::string& message) {
  throw std::invalid_argument(message);  // ValueError in Python
}

[[noreturn]] inline void refuse_index(const std::string& message) {
  throw std::out_of_range(message);  // IndexError in Python
}

[[noreturn]] inline void refuse_race(const std::string& what) {
  throw std::runtime_error(what + " changed while the batch was built from them.");
}

[[noreturn]] inline void refuse_visit_count(int64_t most) {
  refuse_value("A batch holds at most " + text(most) + " codes and as many visits; this one has " +
               "more visits.");
}

// Counts offenders and remembers the position of the first of them.
struct Offenders {
  int64_t count = 0;
  int64_t patient = 0;
  int64_t visit = 0;
  int64_t code = 0;

  void add(int64_t at_patient, int64_t at_visit = 0, int64_t at_code = 0) {
    if (count++ > 0) return;
    patient = at_patient;
    visit = at_visit;
    code = at_code;
  }
  explicit operator bool() const { return count > 0; }
};

}  // namespace ehrseq::batching
