// Tensor cores on the host: what mma.sync computes from what the 32 lanes of a warp hold, as the
// PTX ISA defines it element by element (sections "Matrix Fragments for mma.m16n8k16 with floating
// point type" and "for mma.m16n8k8"). A kernel whose lanes hold anything else gets other sums, as
// it would on a GPU. Sums are of floats, in the order of k; a GPU's own order is not defined.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace cuda_on_cpu {

namespace {

constexpr int kRows = 16;
constexpr int kColumns = 8;

struct OfLane {
  float* sum;
  unsigned a[4];
  unsigned b[2];
};

template <typename T>
float half_of(unsigned word, int which) {
  const auto bits = static_cast<uint16_t>(word >> (16 * which));
  return bit_cast<T>(bits);
}

// What a tensor core sees of a float: sign, exponent and the first 10 bits of the fraction.
float as_tf32(unsigned word) { return bit_cast<float>(word & 0xffffe000u); }

template <int kDepth>
struct Matrices {
  float a[kRows][kDepth];
  float b[kDepth][kColumns];

  void multiply(void* const* of_lanes) const {
    for (int lane = 0; lane < 32; ++lane) {
      float* sum = static_cast<OfLane*>(of_lanes[lane])->sum;
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8;
        const int column = lane % 4 * 2 + (i & 1);
        for (int k = 0; k < kDepth; ++k) sum[i] += a[row][k] * b[k][column];
      }
    }
  }
};

template <typename T>
void m16n8k16(void* const* of_lanes) {
  Matrices<16> matrices;
  for (int lane = 0; lane < 32; ++lane) {
    const OfLane& given = *static_cast<const OfLane*>(of_lanes[lane]);
    const int group = lane / 4;
    const int in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      matrices.a[row][column] = half_of<T>(given.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      matrices.b[row][group] = half_of<T>(given.b[i / 2], i % 2);
    }
  }
  matrices.multiply(of_lanes);
}

void m16n8k8(void* const* of_lanes) {
  Matrices<8> matrices;
  for (int lane = 0; lane < 32; ++lane) {
    const OfLane& given = *static_cast<const OfLane*>(of_lanes[lane]);
    const int group = lane / 4;
    const int in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = i == 0 || i == 2 ? group : group + 8;
      const int column = i == 0 || i == 1 ? in_group : in_group + 4;
      matrices.a[row][column] = as_tf32(given.a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      matrices.b[i == 0 ? in_group : in_group + 4][group] = as_tf32(given.b[i]);
    }
  }
  matrices.multiply(of_lanes);
}

}  // namespace

void mma(const char* shape, const char* types, float (&sum)[4], const uint4& a, unsigned b0,
         unsigned b1) {
  OfLane mine{sum, {a.x, a.y, a.z, a.w}, {b0, b1}};
  const std::string what = std::string(shape) + "." + types;
  if (what == "m16n8k16.bf16.bf16") return meet_whole_warp(&mine, m16n8k16<__nv_bfloat16>);
  if (what == "m16n8k16.f16.f16") return meet_whole_warp(&mine, m16n8k16<__half>);
  if (what == "m16n8k8.tf32.tf32") return meet_whole_warp(&mine, m16n8k8);
  throw std::runtime_error("mma: there is no " + what);
}

// To nearest, ties away from zero, as cvt.rna does.
unsigned rounded_to_tf32(float x) {
  const auto bits = bit_cast<unsigned>(x);
  if (x != x) return 0x7fffffffu;
  if (std::isinf(x)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace cuda_on_cpu
