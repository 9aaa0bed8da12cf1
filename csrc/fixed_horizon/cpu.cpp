// fixed_horizon_bce on the CPU: loss and gradient in one call. The loops over visits
// are in row_kernels.h, that over patients in common/survival/visit_loss.h.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/arguments.h"
#include "common/survival/columns.h"
#include "common/survival/faults.h"
#include "common/survival/groups.h"
#include "common/survival/transposed_visits.h"
#include "common/survival/visit_loss.h"
#include "common/tensors.h"
#include "fixed_horizon/arguments.h"
#include "fixed_horizon/reader.h"
#include "fixed_horizon/rows.h"

namespace ehrseq::fixed_horizon {
namespace {

// The sum of the weights, and the ranges of the visits that count.
template <typename Layout>
struct RangeWorker {
  const Layout& layout;
  const Settings& settings;
  GroupReader reader;
  Range* ranges;

  bool group(int64_t first, int64_t count, double* sums) {
    bool possible = reader.read(layout, first, count);
    if (!possible) return false;
    bool has_visits = reader.ranges_need_visits(layout);
    if (has_visits) reader.read_visits(layout);
    constexpr int64_t kPatientsAhead = 12;
    for (int64_t i = 0; i < kPatientsAhead; ++i) reader.prefetch_times(layout, i);
    for (int64_t i = 0; i < count; ++i) {
      reader.prefetch_times(layout, i + kPatientsAhead);
      const Range range = ranges[first + i] = reader.range(layout, settings, i);
      if (range.end < 0) {
        if (!has_visits) reader.read_visits(layout);
        has_visits = true;
        sums[i] = weight_of_visits(settings, reader.patient(i), &possible);
      } else {
        sums[i] = range.end == 0 ? 0.0 : static_cast<double>(range.end) * reader.weight(i);
      }
    }
    return possible;
  }
};

// The loss of one patient of a group that was read.
template <typename scalar_t, typename Layout>
class PatientLoss {
 public:
  PatientLoss(const Layout& layout, const Settings& settings, const Targets& targets,
              const Range* ranges)
      : layout_(layout), settings_(settings), reader_(targets), ranges_(ranges) {}

  bool read(int64_t first, int64_t count) {
    first_ = first;
    const Range* ranges = ranges_ + first;
    const auto is_none = [](const Range& range) { return range.end < 0; };
    has_ranges_ = std::none_of(ranges, ranges + count, is_none);
    if (has_ranges_) {
      reader_.read_weights(layout_, first, count);
      return true;
    }
    const bool possible = reader_.read(layout_, first, count);
    if (possible) reader_.read_visits(layout_);
    return possible;
  }

  // Of the first `count` patients, from the row of the first one on.
  void of(int64_t count, const Row<scalar_t>& row, double* losses, bool* possible) const {
    const Range* ranges = ranges_ + first_;
    const double* weights = reader_.weights();
    if (has_ranges_) return losses_of_ranges(settings_, {ranges, weights, count}, row, losses);
    for (int64_t i = 0; i < count; ++i) {
      if (ranges[i].end >= 0) {
        losses_of_ranges(settings_, {ranges + i, weights + i, 1}, row.after(i), losses + i);
      } else {
        losses[i] = loss_of_visits(settings_, reader_.patient(i), row.after(i), possible);
      }
    }
  }

  int64_t slots() const { return reader_.slots(); }

 private:
  const Layout& layout_;
  const Settings& settings_;
  GroupReader reader_;
  const Range* ranges_;
  int64_t first_ = 0;
  bool has_ranges_ = false;
};

template <typename scalar_t>
struct Data {
  const scalar_t* logits;
  saved_grad_t<scalar_t>* grad;    // null where no gradient is needed
  accumulator_t<scalar_t>* terms;  // of each visit; null where they are summed
};

template <typename scalar_t, typename Layout>
class TermWorker;

template <typename scalar_t>
class TermWorker<scalar_t, PaddedVisits> {
 public:
  TermWorker(const PaddedVisits& layout, PatientLoss<scalar_t, PaddedVisits> loss,
             const Data<scalar_t>& data)
      : layout_(layout), loss_(std::move(loss)), data_(data) {}

  bool group(int64_t first, int64_t count, double* sums) {
    bool possible = loss_.read(first, count);
    if (!possible) return false;
    const Row<scalar_t> rows{data_.logits, data_.grad, data_.terms, layout_.slots()};
    loss_.of(count, rows.after(first), sums, &possible);
    return possible;
  }

 private:
  const PaddedVisits& layout_;
  PatientLoss<scalar_t, PaddedVisits> loss_;
  Data<scalar_t> data_;
};

// Visits of a packed batch are transposed into rows, and what comes of them back.
template <typename scalar_t>
class TermWorker<scalar_t, PackedPatients> {
 public:
  TermWorker(const PackedPatients& layout, PatientLoss<scalar_t, PackedPatients> loss,
             const Data<scalar_t>& data)
      : layout_(layout), loss_(std::move(loss)), data_(data), visits_(layout.ranks(), 1) {}

  bool group(int64_t first, int64_t count, double* sums) {
    bool possible = loss_.read(first, count);
    if (!possible) return false;
    const int64_t slots = loss_.slots();
    visits_.gather(data_.logits, first, count, slots);
    auto* grads = data_.grad ? visits_.zero_gradients() : nullptr;
    if (data_.terms) terms_.resize(count * slots);
    const Row<scalar_t> rows{visits_.values(), grads, data_.terms ? terms_.data() : nullptr, slots};
    loss_.of(count, rows, sums, &possible);
    if (grads) visits_.scatter_gradients(data_.grad);
    for (int64_t visit = 0; visit < (data_.terms ? slots : 0); ++visit) {
      const int64_t present =
          std::clamp<int64_t>(layout_.ranks().ranks_at(visit) - first, 0, count);
      auto* to = data_.terms + layout_.ranks().row(first, visit);
      for (int64_t i = 0; i < present; ++i) to[i] = terms_[i * slots + visit];
    }
    return possible;
  }

 private:
  const PackedPatients& layout_;
  PatientLoss<scalar_t, PackedPatients> loss_;
  Data<scalar_t> data_;
  TransposedVisits<scalar_t> visits_;
  std::vector<accumulator_t<scalar_t>> terms_;
};

// `share_of(total weight)` is what the sum of the terms is multiplied by for the mean.
template <typename Layout, typename ShareOf>
std::tuple<Tensor, Tensor> loss_of(const Layout& layout, const Targets& targets, Settings settings,
                                   const Tensor& logits, Reduction reduction, bool needs_grad,
                                   const ShareOf& share_of) {
  const Tensor rows = made_contiguous(logits);
  bool possible = true;
  std::vector<Range> ranges(layout.patients());
  const auto make_reader = [&] {
    return RangeWorker<Layout>{layout, settings, GroupReader(targets), ranges.data()};
  };
  const double total = sum_of_patients(layout, layout.rows(), make_reader, &possible);
  if (!possible) refuse_values(targets, layout);
  if (reduction == Reduction::kMean) settings.share = share_of(total);
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), targets.operation, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = accumulator_t<scalar_t>;
    const bool reduces = reduction != Reduction::kNone;
    const Tensor loss =
        allocated(rows, reduces ? std::vector<int64_t>{} : shape_of(rows), kDtypeOf<T>);
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const Data<scalar_t> given{data<const scalar_t>(rows),
                               needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr,
                               reduces ? nullptr : data<T>(loss)};
    const auto make_worker = [&] {
      return TermWorker<scalar_t, Layout>(
          layout, PatientLoss<scalar_t, Layout>(layout, settings, targets, ranges.data()), given);
    };
    const double sum = sum_of_patients(layout, layout.rows(), make_worker, &possible);
    if (!possible) refuse_values(targets, layout);
    if (reduces) *data<T>(loss) = static_cast<T>(sum * settings.share);
    result = {loss, grad};
  });
  return result;
}

std::optional<Column> column_of(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return Column(*tensor);
}

std::tuple<Tensor, Tensor> fixed_horizon_bce(
    Tensor logits, Tensor event_times, Tensor event_indicators, OptionalTensor sequence_mask,
    OptionalTensor row_starts, OptionalTensor unsorted_indices, OptionalTensor last_rows,
    OptionalTensor visit_times, OptionalTensor visit_weight, OptionalTensor sample_weight,
    double horizon, double pos_weight, int64_t reduction, bool needs_grad) {
  constexpr const char* kName = "fixed_horizon_bce";
  expect_on_cpu(kName, logits, event_times, event_indicators, sequence_mask, row_starts,
                unsorted_indices, last_rows, visit_times, visit_weight, sample_weight);
  const bool packed = expect_arguments(logits, event_times, event_indicators, sequence_mask,
                                       row_starts, unsorted_indices, last_rows, visit_times,
                                       visit_weight, sample_weight, horizon, pos_weight, reduction);
  const Targets targets{kName,
                        Column(event_times),
                        Column(event_indicators),
                        VisitColumn(visit_times),
                        VisitColumn(visit_weight),
                        column_of(sample_weight)};
  const Settings settings{horizon, pos_weight, 1.0};
  const auto as_reduction = static_cast<Reduction>(reduction);
  // without a visit that counts the mean is 0; a NaN weight stays one
  const auto share_of = [](double total) { return total == 0 ? 0.0 : 1 / total; };
  if (packed) {
    const RankLayout ranks(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
    return loss_of(PackedPatients(ranks), targets, settings, logits, as_reduction, needs_grad,
                   share_of);
  }
  const PaddedVisits visits(logits.size(0), logits.size(1),
                            VisitMask(sequence_mask, logits.size(1)));
  return loss_of(visits, targets, settings, logits, as_reduction, needs_grad, share_of);
}

}  // namespace
}  // namespace ehrseq::fixed_horizon

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("fixed_horizon_bce", EHRSEQ_BOX(&ehrseq::fixed_horizon::fixed_horizon_bce));
}
