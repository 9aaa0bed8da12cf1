// Where a patient's visits are, on a GPU: in padded and in packed rows.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"
#include "common/survival/outcomes.cuh"

namespace ehrseq::survival::cuda {

// [B, V, classes], contiguous, with a mask [B, V] or none.
struct PaddedLayout {
  Numbers mask;  // of any row; `stride` is that of the visits
  int64_t mask_row_stride;

  struct Visits {
    const PaddedLayout& layout;
    int64_t patient;
    unsigned slots;

    // Every slot has a place, and its gradient has to be written.
    __device__ bool has(unsigned) const { return true; }
    __device__ int64_t row(unsigned visit) const { return patient * slots + visit; }
    __device__ bool counts(unsigned visit) const {
      if (layout.mask.data == nullptr) return true;
      Numbers mask = layout.mask;
      const int64_t offset = patient * layout.mask_row_stride * mask.bytes;
      mask.data = static_cast<const char*>(mask.data) + offset;
      return is_set(mask, visit);
    }
    template <typename T>
    __device__ T weight(unsigned) const {
      return T(1);
    }
  };

  __device__ Visits visits_of(int64_t patient, unsigned slots) const {
    return {*this, patient, slots};
  }
};

// Visit t of patient p is row row_starts[t] + ranks[p], if the patient has that many visits.
struct PackedLayout {
  const int64_t* row_starts;  // [slots + 1]
  const int64_t* ranks;
  int64_t n_visits;
  int64_t patients;

  struct Visits {
    const PackedLayout& layout;
    int64_t rank;

    __device__ bool has(unsigned visit) const {
      return rank < layout.row_starts[visit + 1] - layout.row_starts[visit];
    }
    __device__ int64_t row(unsigned visit) const {
      const int64_t row = layout.row_starts[visit] + rank;
      require(row >= 0 && row < layout.n_visits);
      return row;
    }
    __device__ bool counts(unsigned visit) const { return has(visit); }
    template <typename T>
    __device__ T weight(unsigned) const {
      return T(1);
    }
  };

  // The patients' rows make up the batch if its ends fit, the sizes do not rise and the ranks
  // differ. The last two are not checked: that would take a kernel of its own.
  __device__ Visits visits_of(int64_t patient, unsigned slots) const {
    if (patient == 0) {
      const int64_t all_start = slots == 0 ? patients : row_starts[1];
      require(row_starts[0] == 0 && row_starts[slots] == n_visits && all_start == patients);
    }
    const int64_t rank = ranks[patient];
    require(rank >= 0 && rank < patients);
    return {*this, rank};
  }
};

// The visits of either layout, with a weight for each row, of the type T that a loss is summed in.
template <typename Visits>
struct WeightedVisits : Visits {
  const void* weights;

  template <typename T>
  __device__ T weight(unsigned visit) const {
    return static_cast<const T*>(weights)[this->row(visit)];
  }
};

template <typename Layout>
struct WeightedLayout {
  Layout layout;
  const void* weights;

  __device__ WeightedVisits<typename Layout::Visits> visits_of(int64_t patient,
                                                               unsigned slots) const {
    return {layout.visits_of(patient, slots), weights};
  }
};

}  // namespace ehrseq::survival::cuda
