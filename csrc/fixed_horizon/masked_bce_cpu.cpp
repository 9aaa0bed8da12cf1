// masked_bce on the CPU: loss and gradient in one call, after the sum of the weights. The loops
// over slots are in masked_bce_kernels.h.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/denormals.h"
#include "common/dtypes.h"
#include "common/operators.h"
#include "common/parallel.h"
#include "common/survival/columns.h"
#include "common/survival/groups.h"
#include "common/tensors.h"
#include "fixed_horizon/arguments.h"
#include "fixed_horizon/masked_bce.h"

namespace ehrseq::fixed_horizon {
namespace {

constexpr const char* kMaskedBce = "masked_bce";
constexpr int64_t kWorthAThread = 16384;  // slots

// Numbers of all slots, as kernels take them: most dtypes as they are stored.
class SlotNumbers {
 public:
  explicit SlotNumbers(const Tensor& given)
      : tensor_(made_contiguous(given)),
        column_(Column::of_visits(tensor_)),
        data_(static_cast<const char*>(tensor_.const_data_ptr())),
        bytes_(static_cast<int64_t>(tensor_.element_size())) {
    switch (tensor_.scalar_type()) {
      case ScalarType::Bool:
        stored_ = Stored::kBool;
        break;
      case ScalarType::Long:
        stored_ = Stored::kLong;
        break;
      case ScalarType::Float:
        stored_ = Stored::kFloat;
        break;
      case ScalarType::Double:
        stored_ = Stored::kDouble;
        break;
      default:
        converts_ = true;
    }
  }

  bool converts() const { return converts_; }
  int64_t bytes() const { return bytes_; }

  // Slots first..first + count, at most kChunkSlots; those of blocks whose word is 0 may be
  // anything. `words` may be null: all blocks are read then. Converted ones are in `memory`.
  Numbers at(int64_t first, int64_t count, const uint64_t* words, double* memory) const {
    if (!converts_) return {stored_, data_ + first * bytes_};
    for (int64_t at = 0; at < count; at += kBlockSlots) {
      if (words != nullptr && words[at / kBlockSlots] == 0) continue;
      column_.read(first + at, first + std::min(at + kBlockSlots, count), memory + at);
    }
    return {Stored::kDouble, memory};
  }

 private:
  Tensor tensor_;
  Column column_;
  const char* data_;
  int64_t bytes_;
  Stored stored_ = Stored::kDouble;
  bool converts_ = false;
};

// The sum of one number per chunk, in the order of chunks: the same bits for any number of threads.
// make_body() gives each thread its body(first, count, possible), which gives the number of slots
// first..first + count.
template <typename MakeBody>
double sum_of_chunks(int64_t slots, int64_t grain, const MakeBody& make_body, bool* possible) {
  const int64_t chunks = (slots + kChunkSlots - 1) / kChunkSlots;
  std::vector<double> sums(chunks);
  std::atomic<bool> all_possible{true};
  parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const KeepDenormals denormals;
    auto body = make_body();
    bool fits = true;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunkSlots;
      sums[chunk] = body(first, std::min(kChunkSlots, slots - first), &fits);
    }
    if (!fits) all_possible.store(false, std::memory_order_relaxed);
  });
  if (!all_possible.load()) *possible = false;
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

using Memory = std::unique_ptr<double[]>;

Memory memory_for(const SlotNumbers& numbers) {
  return Memory(numbers.converts() ? new double[kChunkSlots] : nullptr);
}

std::tuple<Tensor, Tensor> masked_bce(Tensor logits, Tensor labels, Tensor weights,
                                      bool needs_grad) {
  expect_on_cpu(kMaskedBce, logits, labels, weights);
  expect_given_labels(logits, labels, weights);
  const Tensor rows = made_contiguous(logits);
  const SlotNumbers of_labels(labels);
  const SlotNumbers of_weights(weights);
  const int64_t slots = rows.numel();
  const std::unique_ptr<uint64_t[]> words(new uint64_t[slots / kBlockSlots + 1]);
  bool possible = true;

  const int64_t chunks = (slots + kChunkSlots - 1) / kChunkSlots;
  const auto make_sum = [&] {
    return [&, memory = memory_for(of_weights)](int64_t first, int64_t count, bool* fits) {
      return read_weights(of_weights.at(first, count, nullptr, memory.get()), count,
                          words.get() + first / kBlockSlots, fits);
    };
  };
  const double total =
      sum_of_chunks(slots, grain_of_bytes(chunks, slots * of_weights.bytes()), make_sum, &possible);
  const double share = total < 1 ? 1.0 : 1 / total;  // a NaN stays one

  std::tuple<Tensor, Tensor> result;
  dispatch_floating(rows.scalar_type(), kMaskedBce, [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    using T = accumulator_t<scalar_t>;
    const Tensor loss = allocated(rows, {}, kDtypeOf<T>);
    const Tensor grad = empty_gradient<scalar_t>(rows, needs_grad);
    const auto* values = data<const scalar_t>(rows);
    auto* grads = needs_grad ? data<saved_grad_t<scalar_t>>(grad) : nullptr;
    const auto make_loss = [&] {
      return [&, label_memory = memory_for(of_labels), weight_memory = memory_for(of_weights)](
                 int64_t first, int64_t count, bool* fits) {
        const uint64_t* of_chunk = words.get() + first / kBlockSlots;
        const GivenSlots<scalar_t> given{values + first,
                                         of_labels.at(first, count, of_chunk, label_memory.get()),
                                         of_weights.at(first, count, of_chunk, weight_memory.get()),
                                         of_chunk,
                                         grads == nullptr ? nullptr : grads + first,
                                         count,
                                         slots - first,
                                         !of_labels.converts()};
        return loss_of_given(given, share, fits);
      };
    };
    const double sum =
        possible ? sum_of_chunks(slots, kWorthAThread / kChunkSlots, make_loss, &possible) : 0.0;
    if (!possible) {
      refuse(kMaskedBce, "labels and weights",
             "labels in [0, 1] where weights are not 0, and weights of at least 0", "others");
    }
    *data<T>(loss) = static_cast<T>(sum * share);
    result = {loss, grad};
  });
  return result;
}

}  // namespace
}  // namespace ehrseq::fixed_horizon

STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast, CPU, m) {
  m.impl("masked_bce", EHRSEQ_BOX(&ehrseq::fixed_horizon::masked_bce));
}
