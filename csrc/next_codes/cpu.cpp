// next_codes_bce on the CPU: loss and gradients of a linear layer with a sigmoid per code, some
// rows at a time. The products are those of linear/kernels.h, whose sums have one order for any
// number of threads; the loop over a row of logits is in row_kernels.h.

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/operators.h"
#include "linear/products.h"
#include "next_codes/arguments.h"
#include "next_codes/row.h"

namespace ehrseq::next_codes {
namespace {

using linear::Backward;
using linear::Forward;
using linear::Kernels;
using linear::Shape;

// The ragged targets of the rows of states.
struct Targets {
  Tensor codes_tensor;
  Tensor offsets_tensor;
  const int32_t* codes;
  const int32_t* offsets;

  // The codes of a row, each once. Those that are no columns (-1) are left out.
  void read(int64_t row, std::vector<int32_t>& unique) const {
    unique.assign(codes + offsets[row], codes + offsets[row + 1]);
    std::sort(unique.begin(), unique.end());
    unique.erase(std::unique(unique.begin(), unique.end()), unique.end());
    if (!unique.empty() && unique.front() < 0) unique.erase(unique.begin());
  }
};

// Checked at every call: wrong offsets and codes would lead out of bounds.
Targets read_targets(const Tensor& codes, const Tensor& code_offsets, const Shape& shape,
                     bool sampled) {
  Targets targets{made_contiguous(codes), made_contiguous(code_offsets), nullptr, nullptr};
  targets.codes = data<const int32_t>(targets.codes_tensor);
  targets.offsets = data<const int32_t>(targets.offsets_tensor);
  const int32_t* offsets = targets.offsets;
  const int64_t n_codes = codes.size(0);
  int64_t at = 0;
  if (offsets[0] >= 0 && offsets[0] <= n_codes) {
    for (at = 1; at <= shape.rows; ++at) {
      if (offsets[at] < offsets[at - 1] || offsets[at] > n_codes) break;
    }
  }
  if (at <= shape.rows) {
    refuse(kName, "code_offsets", "to rise within the " + std::to_string(n_codes) + " codes",
           std::to_string(offsets[at]) + " at position " + std::to_string(at));
  }
  const int64_t lowest = sampled ? -1 : 0;
  int64_t found = 0;
  int64_t first = -1;
  for (int64_t i = offsets[0]; i < offsets[shape.rows]; ++i) {
    const bool outside = targets.codes[i] < lowest || targets.codes[i] >= shape.units;
    if (outside && found++ == 0) first = i;
  }
  if (found == 0) return targets;
  const int64_t visit = std::upper_bound(offsets, offsets + shape.rows + 1, first) - offsets - 1;
  throw std::out_of_range(
      "Found " + std::to_string(found) + " codes outside the vocabulary: expected 0 <= code < " +
      std::to_string(shape.units) + ". The first is " + std::to_string(targets.codes[first]) +
      ": codes[" + std::to_string(first) + "], of visit " + std::to_string(visit) + ".");
}

template <typename T>
struct Weights {
  const T* class_weight;
  const T* positive_weight;
  const T* row_scale;
  bool sampled;
};

// Losses of rows whose logits lie one after another, and the gradients of the logits.
template <typename T>
class RowLosses {
 public:
  RowLosses(const Shape& shape, const Targets& targets, const Weights<T>& weights, T* loss)
      : shape_(shape), targets_(targets), weights_(weights), loss_(loss) {}

  // Rows [from, to); `logits` is the place of the first of them, and is changed.
  void compute(int64_t from, int64_t to, T* logits, const Backward<T>* gradients) const {
    static const RowKernel<T> kernel = row_kernel<T>();
    const int64_t lanes = linear::kernels<T>().lanes;
    std::vector<int32_t> positives;
    std::vector<T> kept;
    for (int64_t row = from; row < to; ++row, logits += shape_.units) {
      targets_.read(row, positives);
      kept.resize(positives.size());
      const T scale = weights_.row_scale ? weights_.row_scale[row] : T(1);
      Row<T> task{logits,
                  shape_.units,
                  weights_.class_weight,
                  weights_.positive_weight,
                  positives.data(),
                  static_cast<int64_t>(positives.size()),
                  kept.data(),
                  weights_.sampled,
                  scale,
                  nullptr,
                  0};
      if (gradients) {
        task.slopes = gradients->unit_gradients + (row - gradients->chunk_row) * lanes;
        task.block_stride = gradients->chunk_size * lanes;
      }
      loss_[row] = static_cast<T>(kernel(task));
    }
  }

 private:
  const Shape& shape_;
  const Targets& targets_;
  const Weights<T>& weights_;
  T* loss_;
};

// Rows whose logits are computed together: so many that the weight is not read too often, so few
// that they stay in the second-level cache.
template <typename T>
int64_t rows_together(const Shape& shape) {
  constexpr int64_t kBytes = int64_t{1} << 20;
  const int64_t fit = kBytes / std::max<int64_t>(1, shape.units * sizeof(T));
  return std::clamp<int64_t>(fit, 12, linear::kRowsTogether);
}

template <typename T>
linear::Gradients loss_and_gradients(const Tensor& states, const Shape& shape, const T* input,
                                     const T* weight, const T* bias, const RowLosses<T>& losses,
                                     bool need_states, bool need_weight) {
  const Kernels<T>& run = linear::kernels<T>();
  const int64_t threads = linear::threads_for(shape);
  const int64_t together = rows_together<T>(shape);
  const Tensor logits = scratch<T>(states, {threads, together, shape.units});
  const auto compute = [&](const Forward<T>& layer, const Backward<T>* gradients, int64_t from,
                           int64_t to, int64_t share) {
    T* place = data<T>(logits) + share * together * shape.units;
    for (int64_t row = from; row < to; row += together) {
      const int64_t last = std::min(row + together, to);
      run.layer(layer, row, last, place);
      losses.compute(row, last, place, gradients);
    }
  };
  if (!need_states && !need_weight) {
    linear::forward_products<T>(states, shape, linear::Activation::kNone, input, weight, bias,
                                [&](const Forward<T>& layer, int64_t from, int64_t to,
                                    int64_t share) { compute(layer, nullptr, from, to, share); });
    return {scratch<T>(states, {0}), scratch<T>(states, {0}), scratch<T>(states, {0})};
  }
  const int64_t blocks = linear::blocks_of<T>(shape.units);
  const Tensor panels = scratch<T>(states, {blocks, shape.inputs, run.lanes});
  share_out(blocks, threads, [&](int64_t from, int64_t to, int64_t) {
    run.pack_unit_panels(shape, weight, from, to, data<T>(panels));
  });
  const Forward<T> layer{shape, linear::Activation::kNone, input, data<T>(panels), bias};
  return linear::backward_products<T>(
      states, shape, input, weight, need_states, need_weight,
      [&](const Backward<T>& gradients, int64_t from, int64_t to, int64_t share) {
        compute(layer, &gradients, from, to, share);
      },
      [](const auto&...) {});
}

template <typename T>
Tensor sum_of(const Tensor& loss, const T* row_scale) {
  double sum = 0;
  for (int64_t row = 0; row < loss.size(0); ++row) {
    sum += static_cast<double>(data<T>(loss)[row]) * (row_scale ? row_scale[row] : T(1));
  }
  const Tensor total = scratch<T>(loss, {});
  *data<T>(total) = static_cast<T>(sum);
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> next_codes_bce(
    Tensor states, Tensor weight, OptionalTensor bias, Tensor codes, Tensor code_offsets,
    OptionalTensor pos_weight, OptionalTensor class_weight, OptionalTensor row_scale, bool total,
    bool sampled, bool need_states, bool need_weight) {
  expect_on_cpu(kName, states, weight, bias, codes, code_offsets, pos_weight, class_weight,
                row_scale);
  const Sizes sizes = expect_arguments(states, weight, bias, codes, code_offsets, pos_weight,
                                       class_weight, row_scale);
  const Shape shape{sizes.rows, sizes.inputs, sizes.classes};
  const bool is_double = states.scalar_type() == ScalarType::Double;
  const Targets targets = read_targets(codes, code_offsets, shape, sampled);
  const auto compute = [&](auto tag) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using T = typename decltype(tag)::type;
    Operands operands;
    const Weights<T> weights{operands.as<T>(class_weight), operands.as<T>(pos_weight),
                             operands.as<T>(row_scale), sampled};
    const Tensor loss = scratch<T>(states, {shape.rows});
    const RowLosses<T> losses(shape, targets, weights, data<T>(loss));
    const linear::Gradients gradients =
        loss_and_gradients<T>(states, shape, operands.as<T>(states), operands.as<T>(weight),
                              operands.as<T>(bias), losses, need_states, need_weight);
    return {total ? sum_of<T>(loss, weights.row_scale) : loss, gradients.input, gradients.weight,
            gradients.bias};
  };
  return is_double ? compute(TypeTag<double>{}) : compute(TypeTag<float>{});
}

}  // namespace
}  // namespace ehrseq::next_codes

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("next_codes_bce", EHRSEQ_BOX(&ehrseq::next_codes::next_codes_bce));
}
