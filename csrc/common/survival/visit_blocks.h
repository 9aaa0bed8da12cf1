// The visits of a batch, padded or packed, in blocks of rows that are next to one another; for
// losses whose terms are visits.
//
// A term does not depend on where in a block its row is, and a patient's terms are summed in the
// order of VisitSums in either layout. So both layouts give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/survival/rank_layout.h"
#include "common/survival/visit_mask.h"

namespace ehrseq::survival {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kGroupPatients = 64;

// Rows row..row + count, at most kBlockRows. They are visits of one patient, or (`by_patient`) one
// visit of neighbouring patients. Patients are counted as the layout has them.
struct Block {
  int64_t row;
  int64_t count;
  int64_t patient;
  int64_t visit;
  bool by_patient;
  int64_t next_row = 0;  // the block after it, as far as it is known
  int64_t next_count = 0;

  int64_t patient_of(int64_t i) const { return by_patient ? patient + i : patient; }
};

class PaddedVisits {
 public:
  PaddedVisits(int64_t patients, int64_t slots, VisitMask mask)
      : patients_(patients), slots_(slots), mask_(std::move(mask)) {}

  int64_t patients() const { return patients_; }
  int64_t rows() const { return patients_ * slots_; }
  int64_t patient(int64_t number) const { return number; }
  int64_t row(int64_t patient, int64_t visit) const { return patient * slots_ + visit; }
  int64_t visits(int64_t patient) const {  // or kMalformed
    int64_t visits;
    mask_.count_visits(patient, patient + 1, &visits);
    return visits;
  }
  int64_t slots() const { return slots_; }
  int64_t visits_at_most(int64_t) const { return slots_; }
  const VisitMask& mask() const { return mask_; }

  // body(block) for the visits of patients first..first + count, padding(row, count) for what is
  // none. False where a mask is malformed.
  template <typename Body, typename Padding>
  bool for_each_block(int64_t first, int64_t count, Body&& body, Padding&& padding) const {
    int64_t visits[kGroupPatients];
    mask_.count_visits(first, first + count, visits);
    for (int64_t i = 0; i < count; ++i) {
      if (visits[i] == kMalformed) return false;
      const int64_t row = (first + i) * slots_;
      for (int64_t visit = 0; visit < visits[i]; visit += kBlockRows) {
        Block block{row + visit, std::min(kBlockRows, visits[i] - visit), first + i, visit, false};
        const int64_t left = visits[i] - visit - block.count;
        if (left > 0) {
          block.next_row = block.row + block.count;
          block.next_count = std::min(kBlockRows, left);
        } else if (i + 1 < count) {
          block.next_row = row + slots_;
          block.next_count = std::clamp<int64_t>(visits[i + 1], 0, kBlockRows);
        }
        body(block);
      }
      if (visits[i] < slots_) padding(row + visits[i], slots_ - visits[i]);
    }
    return true;
  }

 private:
  int64_t patients_;
  int64_t slots_;
  VisitMask mask_;
};

class PackedPatients {
 public:
  explicit PackedPatients(const RankLayout& layout) : layout_(layout), rank_(layout.patients()) {
    for (int64_t rank = 0; rank < layout.patients(); ++rank) {
      rank_[layout.patient_of_rank(rank)] = rank;
    }
  }

  int64_t patients() const { return layout_.patients(); }
  int64_t rows() const { return layout_.row_starts()[layout_.most_visits()]; }
  int64_t patient(int64_t rank) const { return layout_.patient_of_rank(rank); }
  int64_t row(int64_t patient, int64_t visit) const { return layout_.row(rank_[patient], visit); }
  int64_t visits(int64_t patient) const { return layout_.lengths()[patient]; }
  const RankLayout& ranks() const { return layout_; }
  // Of the patients from that rank on: the first ones have the most visits.
  int64_t visits_at_most(int64_t rank) const { return visits(patient(rank)); }

  template <typename Body, typename Padding>
  bool for_each_block(int64_t first, int64_t count, Body&& body, Padding&&) const {
    for (int64_t visit = 0; visit < layout_.most_visits(); ++visit) {
      const int64_t present = std::min(count, layout_.ranks_at(visit) - first);
      if (present <= 0) break;
      body(Block{layout_.row(first, visit), present, first, visit, true});
    }
    return true;
  }

 private:
  const RankLayout& layout_;
  std::vector<int64_t> rank_;
};

// Each patient's sum of a group, of numbers that its visits have. Visit t goes into lane t % 16.
class VisitSums {
 public:
  explicit VisitSums(int64_t first) : first_(first) {}

  void add(const Block& block, const double* values) {
    double (*lanes)[kLanes] = lanes_ + (block.patient - first_);
    if (block.by_patient) {
      const int64_t lane = block.visit % kLanes;
      for (int64_t i = 0; i < block.count; ++i) lanes[i][lane] += values[i];
      return;
    }
    int64_t at = 0;
    for (; at + kLanes <= block.count; at += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[0][lane] += values[at + lane];
    }
    for (int64_t i = at; i < block.count; ++i) lanes[0][i - at] += values[i];
  }

  // Of patient number first + i.
  double of(int64_t i) const {
    double sums[kLanes];
    std::copy_n(lanes_[i], kLanes, sums);
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    return sums[0];
  }

 private:
  static constexpr int64_t kLanes = 16;
  static_assert(kBlockRows % kLanes == 0);

  int64_t first_;
  double lanes_[kGroupPatients][kLanes] = {};
};

}  // namespace ehrseq::survival
