// The survival losses on a GPU: what is launched, and where its memory comes from.

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/cuda/launch.h"
#include "common/operators.h"
#include "survival_nll/arguments.h"
#include "survival_nll/kernels.cuh"

namespace ehrseq::survival::cuda {
namespace {

using torch::headeronly::ScalarType;

// As in schemas.py.
enum class Link : int64_t { kProbabilities = 0, kSigmoid = 1, kSoftmax = 2 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// A float16 gradient that is still to be multiplied by a loss scale would lose its small values.
template <typename scalar_t>
using saved_grad_t = std::conditional_t<std::is_same_v<scalar_t, __half>, float, scalar_t>;

// --- outcomes --------------------------------------------------------------------------------

Kind kind_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Bool:
      return Kind::kBool;
    case ScalarType::Byte:
      return Kind::kUnsigned;
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return Kind::kSigned;
    case ScalarType::Float:
    case ScalarType::Double:
      return Kind::kFloat;
    case ScalarType::Half:
      return Kind::kHalf;
    case ScalarType::BFloat16:
      return Kind::kBFloat16;
    default:
      throw std::invalid_argument(std::string(name) + ": expected a bool, integer or float dtype");
  }
}

Numbers numbers_of(const Tensor& tensor, int64_t stride, const char* name) {
  return {tensor.const_data_ptr(), stride, static_cast<int>(tensor.element_size()),
          kind_of(tensor.scalar_type(), name)};
}

// One number per patient.
Numbers column(const OptionalTensor& tensor, int64_t patients, const char* name) {
  if (!tensor.has_value()) return {};
  if (tensor->dim() != 1 || tensor->size(0) != patients) {
    throw std::invalid_argument(std::string(name) +
                                ": expected shape [B] with B = " + std::to_string(patients));
  }
  return numbers_of(*tensor, tensor->stride(0), name);
}

Numbers integer_column(const OptionalTensor& tensor, int64_t patients, const char* name) {
  const Numbers numbers = column(tensor, patients, name);
  const bool is_bool = numbers.data != nullptr && numbers.kind == Kind::kBool;
  if (is_bool || numbers.kind > Kind::kSigned) {
    throw std::invalid_argument(std::string(name) + ": expected an integer dtype");
  }
  return numbers;
}

Outcomes outcomes_of(int64_t patients, bool competing, const Tensor& times, const Tensor& types,
                     const OptionalTensor& entries, const OptionalTensor& weights) {
  const char* types_name = competing ? "event_types" : "event_indicators";
  Outcomes outcomes{};
  outcomes.times = integer_column(times, patients, "event_times");
  outcomes.types = column(types, patients, types_name);
  outcomes.entries = integer_column(entries, patients, "entry_times");
  outcomes.weights = column(weights, patients, "sample_weight");
  outcomes.types_are_indicators = !competing;
  if (competing && outcomes.types.kind > Kind::kSigned) {
    throw std::invalid_argument("event_types: expected an integer dtype or bool");
  }
  return outcomes;
}

// --- the sum over patients -------------------------------------------------------------------

// Launches on one stream run one after another, so they can share a ticket, which each leaves as it
// found it: zero. A captured launch runs on whatever streams its graph is replayed on, and so takes
// a ticket of its own, that the graph clears (`cleared`); so does a launch on the stream that each
// host thread has one of, under one name, and one on a stream beyond the last of the tickets.
struct Ticket {
  int stream = 0;
  Tensor cleared;
  bool is_own = false;
};

int number_of_stream(int device, cudaStream_t stream) {
  static std::mutex guard;
  static auto& numbers = *new std::map<std::pair<int, cudaStream_t>, int>;  // outlives the process
  const std::lock_guard<std::mutex> lock(guard);
  return numbers.emplace(std::pair(device, stream), static_cast<int>(numbers.size())).first->second;
}

Ticket ticket_for(const OnDeviceOf& place, const Tensor& like) {
  const auto per_thread = reinterpret_cast<cudaStream_t>(uintptr_t{2});  // cudaStreamPerThread
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(place.stream(), &status), "stream");
  Ticket ticket;
  if (status == cudaStreamCaptureStatusNone && place.stream() != per_thread) {
    ticket.stream = number_of_stream(place.device(), place.stream());
    if (ticket.stream < kTickets) return ticket;
  }
  ticket.is_own = true;
  ticket.cleared = empty(like, {1}, ScalarType::Int);
  fill_zero(ticket.cleared, place.stream());
  return ticket;
}

// --- forward ---------------------------------------------------------------------------------

// About four values for each lane: enough to have in flight, and a warp for all but short rows.
int lanes_for(int64_t values) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kInFlight < values) lanes *= 2;
  return lanes;
}

template <typename Model, typename Layout, typename scalar_t>
std::tuple<Tensor, Tensor> run(const Settings& settings, const Layout& layout,
                               const Outcomes& outcomes, const Tensor& hazards, bool needs_grad) {
  using nll_t = accumulator_t<scalar_t>;
  using grad_t = saved_grad_t<scalar_t>;
  const OnDeviceOf place(hazards);
  const std::vector<int64_t> one{};
  Tensor nll =
      empty(hazards, settings.reduces ? one : std::vector{settings.patients}, kDtypeOf<nll_t>);
  Tensor grad =
      empty(hazards, needs_grad ? shape_of(hazards) : std::vector<int64_t>{0}, kDtypeOf<grad_t>);

  unsigned blocks =
      std::min<int64_t>(kMostBlocks, blocks_for(settings.patients, kThreads / settings.lanes));
  if (settings.reduces) blocks = std::max(blocks, 1u);  // the sum of no patients, too, is written

  Result<nll_t> result{mutable_data_of<nll_t>(nll), nullptr, nullptr, 0};
  Tensor partials;
  Ticket ticket;
  if (settings.reduces && blocks > 1) {
    partials = empty(hazards, {blocks}, ScalarType::Double);
    result.partials = mutable_data_of<double>(partials);
    ticket = ticket_for(place, hazards);
    result.stream = ticket.stream;
    if (ticket.is_own) result.ticket = mutable_data_of<unsigned>(ticket.cleared);
  }
  const Hazards<scalar_t, grad_t> values{data_of<scalar_t>(hazards),
                                         needs_grad ? mutable_data_of<grad_t>(grad) : nullptr};
  launch(nll_and_grad<Model, Layout, scalar_t, grad_t>, dim3(blocks), dim3(kThreads), 0,
         place.stream(), settings, layout, outcomes, values, result);
  return {nll, grad};
}

template <typename Layout>
std::tuple<Tensor, Tensor> nll_and_gradient(Settings settings, const Layout& layout,
                                            const Outcomes& outcomes, const Tensor& hazards,
                                            int64_t link, int64_t reduction, bool needs_grad) {
  settings.nll_of_eps = -std::log(settings.eps);
  const bool is_mean = static_cast<Reduction>(reduction) == Reduction::kMean;
  settings.reduces = static_cast<Reduction>(reduction) != Reduction::kNone;
  settings.share = is_mean ? 1.0 / static_cast<double>(settings.patients) : 1.0;
  std::tuple<Tensor, Tensor> both;
  dispatch_floating(hazards.scalar_type(), "hazards", [&](auto tag) {
    using scalar_t = typename decltype(tag)::type;
    switch (static_cast<Link>(link)) {
      case Link::kProbabilities:
        both = run<Trials<FromProbabilities>, Layout, scalar_t>(settings, layout, outcomes, hazards,
                                                                needs_grad);
        return;
      case Link::kSigmoid:
        both = run<Trials<FromLogits>, Layout, scalar_t>(settings, layout, outcomes, hazards,
                                                         needs_grad);
        return;
      case Link::kSoftmax:
        both = run<Softmax, Layout, scalar_t>(settings, layout, outcomes, hazards, needs_grad);
        return;
    }
    throw std::invalid_argument("link: expected 0, 1 or 2");
  });
  return both;
}

PaddedLayout padded_layout(const OptionalTensor& mask, int64_t patients, int64_t slots) {
  if (!mask.has_value()) return {};
  if (mask->dim() != 2 || mask->size(0) != patients || mask->size(1) != slots) {
    throw std::invalid_argument("sequence_mask: expected shape [B, V] = [" +
                                std::to_string(patients) + ", " + std::to_string(slots) + "]");
  }
  return {numbers_of(*mask, mask->stride(1), "sequence_mask"), mask->stride(0)};
}

std::tuple<Tensor, Tensor> padded_nll(bool competing, const Tensor& hazards, const Tensor& times,
                                      const Tensor& types, const OptionalTensor& mask,
                                      const OptionalTensor& entries, const OptionalTensor& weights,
                                      int64_t link, bool censored_included, double eps,
                                      int64_t reduction, bool needs_grad) {
  expect_with(hazards, times, types, mask, entries, weights);
  const Tensor rows = made_contiguous(hazards);
  const int64_t patients = rows.size(0);
  const int64_t slots = rows.size(1);
  const int64_t classes = competing ? rows.size(2) : 1;
  check_options(competing ? "competing_risks_nll" : "survival_nll", competing, link, eps,
                reduction);
  causes_of(classes, link);
  check_row_length(slots, classes);
  Settings settings{};
  settings.patients = patients;
  settings.slots = static_cast<unsigned>(slots);
  settings.classes = static_cast<unsigned>(classes);
  settings.censored_included = censored_included;
  settings.eps = eps;
  const bool by_visit = static_cast<Link>(link) == Link::kSoftmax;
  settings.lanes = lanes_for(by_visit ? slots * kInFlight : slots * classes);
  return nll_and_gradient(settings, padded_layout(mask, patients, slots),
                          outcomes_of(patients, competing, times, types, entries, weights), rows,
                          link, reduction, needs_grad);
}

std::tuple<Tensor, Tensor> survival_nll(const Tensor& hazards, const Tensor& event_times,
                                        const Tensor& event_indicators,
                                        const OptionalTensor& sequence_mask,
                                        const OptionalTensor& entry_times,
                                        const OptionalTensor& sample_weight, int64_t link,
                                        bool censored_included, double eps, int64_t reduction,
                                        bool needs_grad) {
  if (hazards.dim() != 2) throw std::invalid_argument("hazards: expected shape [B, V]");
  return padded_nll(false, hazards, event_times, event_indicators, sequence_mask, entry_times,
                    sample_weight, link, censored_included, eps, reduction, needs_grad);
}

std::tuple<Tensor, Tensor> competing_risks_nll(const Tensor& hazards, const Tensor& event_times,
                                               const Tensor& event_types,
                                               const OptionalTensor& sequence_mask,
                                               const OptionalTensor& entry_times,
                                               const OptionalTensor& sample_weight, int64_t link,
                                               bool censored_included, double eps,
                                               int64_t reduction, bool needs_grad) {
  if (hazards.dim() != 3) throw std::invalid_argument("hazards: expected shape [B, V, K]");
  return padded_nll(true, hazards, event_times, event_types, sequence_mask, entry_times,
                    sample_weight, link, censored_included, eps, reduction, needs_grad);
}

// The rows of a packed batch, as tensors that live while a kernel is launched.
struct PackedRows {
  Tensor starts;
  Tensor ranks;

  PackedRows(const Tensor& row_starts, const Tensor& unsorted_indices)
      : starts(made_contiguous(row_starts)), ranks(made_contiguous(unsorted_indices)) {
    for (const Tensor* tensor : {&starts, &ranks}) {
      if (tensor->scalar_type() != ScalarType::Long || tensor->dim() != 1) {
        throw std::invalid_argument("row_starts, unsorted_indices: expected one-dimensional int64");
      }
    }
    if (starts.numel() < 1 || slots() > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("row_starts: expected a start for each time and the end");
    }
  }

  int64_t slots() const { return starts.numel() - 1; }
  int64_t patients() const { return ranks.numel(); }
  PackedLayout layout(int64_t n_visits) const {
    return {data_of<int64_t>(starts), data_of<int64_t>(ranks), n_visits, patients()};
  }
};

std::tuple<Tensor, Tensor> packed_survival_nll(
    const Tensor& hazards, const Tensor& row_starts, const Tensor& unsorted_indices,
    const Tensor& last_rows, const Tensor& event_times, const Tensor& event_types,
    const OptionalTensor& entry_times, const OptionalTensor& sample_weight, int64_t link,
    bool censored_included, double eps, int64_t reduction, bool needs_grad) {
  (void)last_rows;  // the sizes of row_starts tell where a patient ends
  if (hazards.dim() < 1 || hazards.dim() > 2) {
    throw std::invalid_argument("hazards: expected shape [n_visits] or [n_visits, K]");
  }
  expect_with(hazards, row_starts, unsorted_indices, event_times, event_types, entry_times,
              sample_weight);
  const bool competing = hazards.dim() == 2;
  const int64_t classes = competing ? hazards.size(1) : 1;
  check_options("packed_survival_nll", competing, link, eps, reduction);
  causes_of(classes, link);
  const PackedRows rows(row_starts, unsorted_indices);
  check_row_length(rows.slots(), classes);
  Settings settings{};
  settings.patients = rows.patients();
  settings.slots = static_cast<unsigned>(rows.slots());
  settings.classes = static_cast<unsigned>(classes);
  settings.censored_included = censored_included;
  settings.eps = eps;
  // By the mean length: the longest patient says little about the others.
  const int64_t visits = hazards.size(0) / std::max<int64_t>(1, rows.patients()) + 1;
  const bool by_visit = static_cast<Link>(link) == Link::kSoftmax;
  settings.lanes = lanes_for(by_visit ? visits * kInFlight : visits * classes);
  return nll_and_gradient(
      settings, rows.layout(hazards.size(0)),
      outcomes_of(rows.patients(), competing, event_times, event_types, entry_times, sample_weight),
      made_contiguous(hazards), link, reduction, needs_grad);
}

// --- backward --------------------------------------------------------------------------------

constexpr int64_t kMostScalingBlocks = 65536;

template <int kValues, typename saved_t, typename grad_t>
void launch_scale_rows(const Scaling<saved_t, grad_t>& task,
                       const LossGradient<accumulator_t<saved_t>>& loss, cudaStream_t stream) {
  const int64_t blocks =
      std::min<int64_t>(kMostScalingBlocks, blocks_for(task.values, kThreads * kValues));
  launch(scale_rows<kValues, saved_t, grad_t>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         0, stream, task, loss);
}

template <typename saved_t, typename grad_t>
Tensor scaled(const Tensor& saved, const Tensor& grad_nll,
              const std::optional<PackedRows>& packed) {
  using nll_t = accumulator_t<saved_t>;
  const bool per_patient = grad_nll.dim() == 1;
  if (saved.dim() < 1) throw std::invalid_argument("survival_nll_scale: grad has no dimensions");
  if (grad_nll.scalar_type() != kDtypeOf<nll_t> || grad_nll.dim() > 1) {
    throw std::invalid_argument("survival_nll_scale: grad_nll is not that of this loss");
  }
  const int64_t patients = packed ? packed->patients() : saved.size(0);
  if (per_patient && grad_nll.size(0) != patients) {
    throw std::invalid_argument("survival_nll_scale: expected one gradient per patient");
  }
  const OnDeviceOf place(saved);
  Tensor grad = empty(saved, shape_of(saved), kDtypeOf<grad_t>);
  if (saved.numel() == 0) return grad;

  Scaling<saved_t, grad_t> task{data_of<saved_t>(saved), mutable_data_of<grad_t>(grad),
                                saved.numel(), saved.numel() / saved.size(0)};
  const LossGradient<nll_t> loss{data_of<nll_t>(grad_nll), per_patient ? grad_nll.stride(0) : 0};
  if (packed && loss.stride != 0) {
    const unsigned blocks =
        std::min<int64_t>(kMostScalingBlocks, blocks_for(patients, kThreads / kWarp));
    launch(scale_packed<saved_t, grad_t>, dim3(blocks), dim3(kThreads), 0, place.stream(), task,
           packed->layout(saved.size(0)), static_cast<unsigned>(packed->slots()), patients, loss);
    return grad;
  }
  // The saved gradient may be a view of a larger tensor; the new one begins an allocation.
  constexpr int kWide = 16 / sizeof(saved_t);
  const bool is_aligned = reinterpret_cast<uintptr_t>(task.saved) % 16 == 0;
  if (is_aligned && task.values % kWide == 0) {
    launch_scale_rows<kWide>(task, loss, place.stream());
  } else {
    launch_scale_rows<1>(task, loss, place.stream());
  }
  return grad;
}

Tensor survival_nll_scale(const Tensor& grad, const Tensor& grad_nll,
                          const OptionalTensor& row_starts, const OptionalTensor& unsorted_indices,
                          const OptionalTensor& last_rows, ScalarType dtype) {
  (void)last_rows;
  if (row_starts.has_value() != unsorted_indices.has_value()) {
    throw std::invalid_argument(
        "survival_nll_scale: row_starts and unsorted_indices must be given together");
  }
  expect_with(grad, grad_nll, row_starts, unsorted_indices);
  const Tensor saved = made_contiguous(grad);
  std::optional<PackedRows> packed;
  if (row_starts.has_value() && unsorted_indices.has_value()) {
    packed.emplace(*row_starts, *unsorted_indices);
  }
  if (dtype == ScalarType::Half && saved.scalar_type() == ScalarType::Float) {
    return scaled<float, __half>(saved, grad_nll, packed);
  }
  if (dtype == saved.scalar_type() && dtype != ScalarType::Half) {
    switch (dtype) {
      case ScalarType::Float:
        return scaled<float, float>(saved, grad_nll, packed);
      case ScalarType::Double:
        return scaled<double, double>(saved, grad_nll, packed);
      case ScalarType::BFloat16:
        return scaled<__nv_bfloat16, __nv_bfloat16>(saved, grad_nll, packed);
      default:
        break;
    }
  }
  throw std::invalid_argument(
      "survival_nll_scale: not the saved gradient of hazards of this dtype");
}

}  // namespace
}  // namespace ehrseq::survival::cuda

EHRSEQ_CUDA_LIBRARY(m) {
  m.impl("survival_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::survival_nll));
  m.impl("competing_risks_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::competing_risks_nll));
  m.impl("packed_survival_nll", EHRSEQ_BOX(&ehrseq::survival::cuda::packed_survival_nll));
  m.impl("survival_nll_scale", EHRSEQ_BOX(&ehrseq::survival::cuda::survival_nll_scale));
}
