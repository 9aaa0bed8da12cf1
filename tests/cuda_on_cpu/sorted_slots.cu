// For tests: what visit pooling's backward pass sorts on the device, and no operator returns.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cuda/launch.h"
#include "visit_pool/sorted_batch.h"

namespace ehrseq::cuda {
namespace {

// The real slots by code, the weights of slots and of visits, the distinct codes and where each
// begins; as long as the most that there could be. sizes: how many slots, and how many codes.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sorted_slots(
    Tensor codes, OptionalTensor mask, int64_t vocabulary, int64_t padding_idx) {
  const OnDeviceOf device("sorted_slots", codes);
  const PaddedBatch batch(codes, mask, vocabulary);
  const SortedBatch<float> sorted(batch, kMean, padding_idx, codes, device.stream());
  const auto copy = [&](const auto* from, int64_t n) {
    using T = std::remove_cv_t<std::remove_reference_t<decltype(*from)>>;
    const auto tensor = empty(codes, {from == nullptr ? 0 : n}, kDtypeOf<T>);
    std::copy_n(from, tensor.numel(), mutable_data_of<T>(tensor));
    return tensor;
  };
  const int64_t most = sorted.most_entries();
  const auto entries = sorted.index().entries;
  const auto weights = sorted.weights();
  const auto sizes = empty(codes, {2}, ScalarType::Int);
  const auto index_codes = empty(codes, {most}, ScalarType::Int);
  const auto index_offsets = empty(codes, {most + 1}, ScalarType::Int);
  auto* n_slots = mutable_data_of<int32_t>(sizes);
  sorted.write_distinct(mutable_data_of<int32_t>(index_codes),
                        mutable_data_of<int32_t>(index_offsets), n_slots + 1, n_slots);
  return {copy(entries.codes, most),
          copy(entries.visits, most),
          copy(weights.of_entries, most),
          copy(weights.of_visits, batch.n_visits),
          index_codes,
          index_offsets,
          sizes};
}

}  // namespace
}  // namespace ehrseq::cuda

STABLE_TORCH_LIBRARY(ehrseq_fast_cuda_on_cpu_tests, m) {
  m.def(
      "sorted_slots(Tensor codes, Tensor? mask, int vocabulary, int padding_idx)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(ehrseq_fast_cuda_on_cpu_tests, CPU, m) {
  m.impl("sorted_slots", TORCH_BOX(&ehrseq::cuda::sorted_slots));
}
