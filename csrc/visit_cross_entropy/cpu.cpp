// visit_cross_entropy on the CPU, of padded logits and of packed ones: loss and gradient in one
// call. The loops over rows are in row_kernels.h, that over patients in
// common/survival/visit_loss.h.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtypes.h"
#include "common/operators.h"
#include "common/survival/arguments.h"
#include "common/survival/columns.h"
#include "common/survival/faults.h"
#include "common/survival/groups.h"
#include "common/survival/visit_loss.h"
#include "common/tensors.h"
#include "visit_cross_entropy/arguments.h"
#include "visit_cross_entropy/rows.h"

namespace ehrseq::visit_cross_entropy {
namespace {

// Labels and weights of rows, whatever their dtypes.
struct Targets {
  Column labels;
  WeightsOfVisits weights;
  int64_t classes;
  int64_t ignore_index;

  // -1 where a label is ignored. False where one is no class, or a weight is negative.
  template <typename Layout>
  bool read(const Layout& layout, const Block& block, int64_t* of_rows, double* row_weights) const {
    labels.read(block.row, block.row + block.count, of_rows);
    const bool known = mark_ignored(of_rows, block.count, classes, ignore_index);
    return weights.read(layout, block, row_weights) && known;
  }

  // Throws std::invalid_argument: the first patient and visit at fault, and how many there are.
  template <typename Layout>
  [[noreturn]] void refuse(const Layout& layout) const {
    Faults unknown;
    for_each_visit(layout, [&](int64_t patient, int64_t visit, int64_t row) {
      const int64_t label = labels.at<int64_t>(row);
      if (label != ignore_index && (label < 0 || label >= classes)) unknown.add(patient, visit);
    });
    if (unknown.count() > 0) {
      const int64_t row = layout.row(unknown.patient(), unknown.visit());
      unknown.refuse("labels must be a class 0.." + std::to_string(classes - 1) + " or " +
                         std::to_string(ignore_index) + " (ignored)",
                     std::to_string(labels.at<int64_t>(row)));
    }
    weights.refuse(layout);
  }
};

// The sum of the weights, for the mean.
template <typename Layout>
struct WeightWorker {
  const Layout& layout;
  const Targets& targets;
  const Settings& settings;
  int64_t labels[kBlockRows] = {};

  void padding(int64_t, int64_t) {}
  bool block(const Block& block, double* values) {
    if (!targets.read(layout, block, labels, values)) return false;
    for (int64_t i = 0; i < block.count; ++i) {
      values[i] = labels[i] < 0 ? 0 : values[i] * settings.weight_of(labels[i]);
    }
    return true;
  }
};

template <typename scalar_t, typename Layout>
struct TermWorker {
  using T = accumulator_t<scalar_t>;

  TermWorker(const Layout& layout, const Targets& targets, const Settings& settings,
             const scalar_t* logits, saved_grad_t<scalar_t>* grad, T* terms)
      : layout(layout),
        targets(targets),
        settings(settings),
        logits(logits),
        grad(grad),
        terms(terms),
        memory(values_in_memory(settings.classes)) {}

  bool block(const Block& block, double* losses) {
    if (!targets.read(layout, block, labels, weights)) return false;
    const int64_t at = block.row * settings.classes;
    rows_loss(
        settings,
        Rows<scalar_t>{logits + at, grad ? grad + at : nullptr, labels, weights, block.count,
                       memory.data(), logits + block.next_row * settings.classes, block.next_count},
        losses);
    if (terms) {
      for (int64_t i = 0; i < block.count; ++i) terms[block.row + i] = static_cast<T>(losses[i]);
    }
    return true;
  }

  void padding(int64_t row, int64_t rows) {
    const int64_t classes = settings.classes;
    if (grad) std::fill_n(grad + row * classes, rows * classes, saved_grad_t<scalar_t>(0));
    if (terms) std::fill_n(terms + row, rows, T(0));
  }

  const Layout& layout;
  const Targets& targets;
  const Settings& settings;
  const scalar_t* logits;
  saved_grad_t<scalar_t>* grad;
  T* terms;  // of each row; null where they are summed
  std::vector<T> memory;
  int64_t labels[kBlockRows] = {};
  double weights[kBlockRows] = {};
};

template <typename Layout>
std::tuple<Tensor, Tensor> loss_of(const Layout& layout, const Tensor& logits,
                                   const std::vector<int64_t>& shape_of_terms,
                                   const Targets& targets, const std::vector<double>& class_weights,
                                   double smoothing, Reduction reduction, bool needs_grad) {
  const Tensor rows = made_contiguous(logits);
  const double* of_classes = class_weights.empty() ? nullptr : class_weights.data();
  Settings settings{targets.classes, smoothing, 1.0, of_classes,
                    static_cast<double>(targets.classes)};
  if (of_classes) {
    settings.sum_of_weights = std::accumulate(class_weights.begin(), class_weights.end(), 0.0);
  }
  bool possible = true;
  if (reduction == Reduction::kMean) {
    const double total = sum_of_visits(
        layout, 2, [&] { return WeightWorker<Layout>{layout, targets, settings}; }, &possible);
    if (!possible) targets.refuse(layout);
    settings.share = 1 / total;
  }
  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kName, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = accumulator_t<scalar_t>;
    const bool reduces = reduction != Reduction::kNone;
    const Tensor loss =
        allocated(rows, reduces ? std::vector<int64_t>{} : shape_of_terms, kDtypeOf<T>);
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const double sum = sum_of_visits(
        layout, targets.classes,
        [&] {
          return TermWorker<scalar_t, Layout>(
              layout, targets, settings, data<const scalar_t>(rows),
              needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr,
              reduces ? nullptr : data<T>(loss));
        },
        &possible);
    if (!possible) targets.refuse(layout);
    if (reduces) *data<T>(loss) = static_cast<T>(sum * settings.share);
    result = {loss, grad};
  });
  return result;
}

// None where none are given.
std::vector<double> weights_of_classes(const OptionalTensor& class_weight, int64_t classes) {
  if (!class_weight.has_value()) return {};
  std::vector<double> weights(classes);
  Column(*class_weight).read(0, classes, weights.data());
  for (int64_t c = 0; c < classes; ++c) {
    if (weights[c] < 0) {
      refuse(kName, "class_weight", "weights of at least 0",
             short_text(weights[c]) + " for class " + std::to_string(c));
    }
  }
  return weights;
}

std::tuple<Tensor, Tensor> visit_cross_entropy(
    Tensor logits, Tensor labels, OptionalTensor sequence_mask, OptionalTensor row_starts,
    OptionalTensor unsorted_indices, OptionalTensor last_rows, OptionalTensor class_weight,
    OptionalTensor visit_weight, OptionalTensor sample_weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, bool needs_grad) {
  expect_on_cpu(kName, logits, labels, sequence_mask, row_starts, unsorted_indices, last_rows,
                class_weight, visit_weight, sample_weight);
  const bool packed =
      expect_arguments(logits, labels, sequence_mask, row_starts, unsorted_indices, last_rows,
                       class_weight, visit_weight, sample_weight, label_smoothing, reduction);
  const int64_t classes = logits.size(packed ? 1 : 2);
  const std::vector<int64_t> of_visits = leading_shape(logits, 1);
  const std::vector<double> class_weights = weights_of_classes(class_weight, classes);
  const Targets targets{Column::of_visits(labels), WeightsOfVisits(visit_weight, sample_weight),
                        classes, ignore_index};
  const auto as_reduction = static_cast<Reduction>(reduction);
  if (packed) {
    const RankLayout ranks(kName, logits.size(0), *row_starts, *unsorted_indices, *last_rows);
    return loss_of(PackedPatients(ranks), logits, of_visits, targets, class_weights,
                   label_smoothing, as_reduction, needs_grad);
  }
  const PaddedVisits visits(logits.size(0), logits.size(1),
                            VisitMask(sequence_mask, logits.size(1)));
  return loss_of(visits, logits, of_visits, targets, class_weights, label_smoothing, as_reduction,
                 needs_grad);
}

}  // namespace
}  // namespace ehrseq::visit_cross_entropy

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("visit_cross_entropy", EHRSEQ_BOX(&ehrseq::visit_cross_entropy::visit_cross_entropy));
}
