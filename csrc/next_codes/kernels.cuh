// The loss of a visit's codes on a GPU: a block for each row of logits. The products before and
// after are torch's.
#pragma once

#include <cstdint>

#include "common/cuda/device.cuh"

namespace ehrseq::next_codes::cuda {

using namespace ehrseq::cuda;  // NOLINT: what all kernels share

constexpr int kThreads = 256;

template <typename T>
struct Rows {
  T* logits;  // [rows of the chunk, classes]; with `slopes` the derivatives in their place
  T* losses;  // [all rows]
  T* kept;    // [n_codes]: the derivatives of the rows' own codes
  const int32_t* codes;
  const int32_t* code_offsets;  // [all rows + 1]
  const T* bias;                // null where there is none; so are the others
  const T* pos_weight;
  const T* class_weight;
  const T* row_scale;
  int64_t first_row;
  int64_t n_codes;
  int classes;
  bool sampled;
  bool slopes;
};

template <typename T>
struct Term {
  T softplus;
  T sigmoid;
};

// 0 * z is NaN where z is -inf, as in PyTorch: a weight of infinity is not hidden.
template <typename T>
__device__ Term<T> term_of(T z) {
  const T e = exp(z > T(0) ? -z : z);
  const T inverse = T(1) / (T(1) + e);
  return {(z > T(0) ? z : z * T(0)) + log1p(e), z > T(0) ? inverse : e * inverse};
}

// A class with this logit adds nothing; no bias is large enough to change that.
template <typename T>
constexpr T kNothing = T(-3.0e38);

// The sum of a block's values, in one order, for thread 0.
__device__ inline double sum_of_block(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  return values[0];
}

template <typename T>
struct OwnCodes {
  const Rows<T>& rows;
  int begin;
  int end;

  // Calls body(i) for each code of the row that counts, by the same thread every time.
  template <typename Body>
  __device__ void each(const Body& body) const {
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
      const int code = rows.codes[i];
      if (rows.sampled && code == -1) continue;  // no column
      require(code >= 0 && code < rows.classes);
      bool is_first = true;
      for (int j = begin; j < i; ++j) is_first = is_first && rows.codes[j] != code;
      if (is_first) body(i, code);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) row_losses(Rows<T> rows) {
  const int64_t row = rows.first_row + blockIdx.x;
  T* logits = rows.logits + int64_t{blockIdx.x} * rows.classes;
  const OwnCodes<T> own{rows, rows.code_offsets[row], rows.code_offsets[row + 1]};
  require(own.begin >= 0 && own.begin <= own.end && own.end <= rows.n_codes);
  const T scale = rows.row_scale ? rows.row_scale[row] : T(1);
  double loss = 0;
  own.each([&](int i, int code) {
    const T z = logits[code] + (rows.bias ? rows.bias[code] : T(0));
    T factor = rows.class_weight ? rows.class_weight[code] : T(1);
    if (rows.pos_weight) factor *= rows.pos_weight[code];
    const Term<T> absent = term_of(-z);
    if (!rows.sampled) loss += static_cast<double>((absent.softplus + z * T(0)) * factor);
    if (rows.slopes) rows.kept[i] = rows.sampled ? T(0) : -absent.sigmoid * factor * scale;
    logits[code] = kNothing<T>;
  });
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < rows.classes; k += kThreads) {
    Term<T> term = term_of(logits[k] + (rows.bias ? rows.bias[k] : T(0)));
    const T factor = rows.class_weight ? rows.class_weight[k] : T(1);
    loss += static_cast<double>(term.softplus * factor);
    if (rows.slopes) logits[k] = term.sigmoid * factor * scale;
  }
  const double sum = sum_of_block(loss);
  if (threadIdx.x == 0) rows.losses[row] = static_cast<T>(sum);
  if (rows.slopes) own.each([&](int i, int code) { logits[code] = rows.kept[i]; });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add_to(T* sums, const T* values, int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at < count) sums[at] += values[at];
}

// One block: the sum of all losses times their scale.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    total_of(const T* losses, const T* row_scale, int64_t rows, T* total) {
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
    sum += static_cast<double>(losses[row]) * (row_scale ? row_scale[row] : T(1));
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *total = static_cast<T>(sum);
}

}  // namespace ehrseq::next_codes::cuda
