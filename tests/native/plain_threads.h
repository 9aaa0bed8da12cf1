// Threads that the thread sanitizer can follow, in place of torch's, whose OpenMP it knows nothing
// of. The same shares as at::parallel_for: at most one per thread, none smaller than the grain.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace ehrseq_plain_threads {

inline int64_t get_num_threads() { return torch::stable::get_num_threads(); }

inline bool& inside() {
  static thread_local bool value = false;
  return value;
}

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t most = grain > 0 ? (count + grain - 1) / grain : count;
  const int64_t threads = inside() ? 1 : std::min<int64_t>(get_num_threads(), most);
  const int64_t share = (count + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t from = begin + share; from < end; from += share) {
    others.emplace_back([&body, from, share, end] {
      inside() = true;
      body(from, std::min(from + share, end));
    });
  }
  const bool before = inside();
  inside() = true;
  body(begin, std::min(begin + share, end));
  inside() = before;
  for (std::thread& other : others) other.join();
}

}  // namespace ehrseq_plain_threads
