// Where the visits of a packed batch are: visit t of patient p is row row_starts[t] + ranks[p].
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/tensors.h"

namespace ehrseq::survival {

class RankLayout {
 public:
  // Tensors that expect_row_numbers has checked. Checks their values, so that no row is outside the
  // batch.
  RankLayout(const char* operation, int64_t n_visits, const Tensor& row_starts, const Tensor& ranks,
             const Tensor& last_rows)
      : operation_(operation),
        row_starts_(made_contiguous(row_starts)),
        ranks_(made_contiguous(ranks)),
        patients_(ranks_.numel()) {
    const Tensor last = made_contiguous(last_rows);
    const int64_t* starts = this->row_starts();
    const int64_t times = row_starts_.numel() - 1;
    if (starts[0] != 0) refuse_start(0, "0");
    if (starts[times] != n_visits)
      refuse_start(times, text(n_visits) + ", the visits of the batch");

    // The first ranks have the most visits.
    std::vector<int64_t> length_of_rank(patients_, 0);
    int64_t present = patients_;
    for (int64_t time = 0; time < times; ++time) {
      const int64_t next = starts[time + 1] - starts[time];
      if (next <= 0 || next > present) {
        refuse_start(time + 1, "1 to " + text(present) + " more than at the position before");
      }
      for (int64_t rank = next; rank < present; ++rank) length_of_rank[rank] = time;
      present = next;
    }
    for (int64_t rank = 0; rank < present; ++rank) length_of_rank[rank] = times;

    const auto* rank_of = static_cast<const int64_t*>(ranks_.const_data_ptr());
    const auto* last_row = static_cast<const int64_t*>(last.const_data_ptr());
    lengths_.resize(patients_);
    patient_of_rank_.assign(patients_, -1);
    for (int64_t patient = 0; patient < patients_; ++patient) {
      const int64_t rank = rank_of[patient];
      if (rank < 0 || rank >= patients_ || patient_of_rank_[rank] >= 0) {
        refuse(operation_, "unsorted_indices", "each of 0.." + text(patients_ - 1) + " once",
               text(rank) + " at position " + text(patient));
      }
      const int64_t length = length_of_rank[rank];
      if (length == 0) {
        refuse(operation_, "row_starts", "a visit of each of " + text(patients_) + " patients",
               "none of patient " + text(patient));
      }
      if (starts[length - 1] + rank != last_row[patient]) {
        refuse(operation_, "last_rows",
               text(starts[length - 1] + rank) + " at position " + text(patient),
               text(last_row[patient]));
      }
      patient_of_rank_[rank] = patient;
      lengths_[patient] = length;
    }
  }

  // The row of rank `rank` at a time, and how many ranks have a visit then: the first ones.
  int64_t row(int64_t rank, int64_t visit) const { return row_starts()[visit] + rank; }
  int64_t ranks_at(int64_t visit) const { return row_starts()[visit + 1] - row_starts()[visit]; }
  int64_t most_visits() const { return row_starts_.numel() - 1; }
  int64_t patient_of_rank(int64_t rank) const { return patient_of_rank_[rank]; }
  int64_t patients() const { return patients_; }
  const std::vector<int64_t>& lengths() const { return lengths_; }
  const int64_t* row_starts() const {
    return static_cast<const int64_t*>(row_starts_.const_data_ptr());
  }

 private:
  static std::string text(int64_t number) { return std::to_string(number); }

  [[noreturn]] void refuse_start(int64_t at, const std::string& expected) const {
    refuse(operation_, "row_starts", expected + " at position " + text(at), text(row_starts()[at]));
  }

  const char* operation_;
  Tensor row_starts_;
  Tensor ranks_;
  int64_t patients_;
  std::vector<int64_t> lengths_;
  std::vector<int64_t> patient_of_rank_;
};

}  // namespace ehrseq::survival
