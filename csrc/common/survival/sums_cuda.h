// Where a loss and its gradient are written on a GPU, and what its sum over patients needs beside.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cuda/launch.h"
#include "common/survival/sums.cuh"

namespace ehrseq::survival::cuda {

// A float16 gradient that is still to be multiplied by a loss scale would lose its small values.
template <typename scalar_t>
using saved_grad_t = std::conditional_t<std::is_same_v<scalar_t, __half>, float, scalar_t>;

// About four values for each lane: enough to have in flight, and a warp for all but short rows.
inline int lanes_for(int64_t values) {
  int lanes = 1;
  while (lanes < kWarp && lanes * kInFlight < values) lanes *= 2;
  return lanes;
}

// A counter of the blocks of a launch that are done. Launches on one stream run one after another,
// so they can share a counter: the last block of each resets it to zero. A captured launch may run
// on any stream, where its graph is replayed, and so has a counter of its own, which the graph
// clears (`cleared`). So do launches on cudaStreamPerThread, one handle for a stream per host
// thread, and those on a stream that `stream_tickets` has no counter for.
struct Ticket {
  int stream = 0;
  Tensor cleared;
  bool is_own = false;
};

inline int number_of_stream(int device, cudaStream_t stream) {
  static std::mutex guard;
  static auto& numbers = *new std::map<std::pair<int, cudaStream_t>, int>;  // outlives the process
  const std::lock_guard<std::mutex> lock(guard);
  return numbers.emplace(std::pair(device, stream), static_cast<int>(numbers.size())).first->second;
}

inline Ticket ticket_for(const OnDeviceOf& device, const Tensor& like) {
  const auto per_thread = reinterpret_cast<cudaStream_t>(uintptr_t{2});  // cudaStreamPerThread
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(device.stream(), &status), "stream");
  Ticket ticket;
  if (status == cudaStreamCaptureStatusNone && device.stream() != per_thread) {
    ticket.stream = number_of_stream(device.device(), device.stream());
    if (ticket.stream < kTickets) return ticket;
  }
  ticket.is_own = true;
  ticket.cleared = empty(like, {1}, ScalarType::Int);
  fill_zero(ticket.cleared, device.stream());
  return ticket;
}

// The tensors that a launch writes, of blocks of kThreads with `lanes` for each patient. They live
// as long as this does.
template <typename nll_t, typename grad_t>
class LossTensors {
 public:
  LossTensors(const OnDeviceOf& device, const Tensor& values, int64_t patients, int lanes,
              bool reduces, bool needs_grad)
      : LossTensors(device, values, patients, lanes, reduces, needs_grad, {patients}) {}

  // `shape` is that of a loss that is not reduced.
  LossTensors(const OnDeviceOf& device, const Tensor& values, int64_t patients, int lanes,
              bool reduces, bool needs_grad, const std::vector<int64_t>& shape)
      : nll(empty(values, reduces ? std::vector<int64_t>{} : shape, kDtypeOf<nll_t>)),
        grad(empty(values, needs_grad ? shape_of(values) : std::vector<int64_t>{0},
                   kDtypeOf<grad_t>)),
        blocks_(std::min<int64_t>(kMostBlocks, blocks_for(patients, kThreads / lanes))) {
    if (!reduces) return;
    blocks_ = std::max(blocks_, 1u);  // the sum of no patients, too, is written
    if (blocks_ == 1) return;
    partials_ = empty(values, {blocks_}, ScalarType::Double);
    ticket_ = ticket_for(device, values);
  }

  unsigned blocks() const { return blocks_; }

  Result<nll_t> result() const {
    Result<nll_t> result{mutable_data_of<nll_t>(nll), nullptr, nullptr, ticket_.stream};
    if (partials_.has_value()) result.partials = mutable_data_of<double>(*partials_);
    if (ticket_.is_own) result.ticket = mutable_data_of<unsigned>(ticket_.cleared);
    return result;
  }

  const Tensor nll;
  const Tensor grad;  // empty where none is needed

 private:
  unsigned blocks_;
  OptionalTensor partials_;
  Ticket ticket_;
};

}  // namespace ehrseq::survival::cuda
