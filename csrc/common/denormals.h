// Arithmetic that keeps subnormal numbers, whatever the calling thread is set to.
// torch.set_flush_denormal(True) holds for the thread that called it alone, so that results would
// depend on which thread computes what; and the small numbers of 16-bit types would be read as 0.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace ehrseq {

class KeepDenormals {
 public:
#if defined(__SSE__)
  KeepDenormals() : before_(_mm_getcsr()) {
    if (before_ & kFlushes) _mm_setcsr(before_ & ~kFlushes);
  }
  ~KeepDenormals() {
    if (before_ & kFlushes) _mm_setcsr(before_);
  }

 private:
  static constexpr unsigned kFlushes = 0x8040;  // results to zero, operands as zeros
  unsigned before_;
#elif defined(__aarch64__)
  KeepDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (before_ & kFlushes) asm volatile("msr fpcr, %0" : : "r"(before_ & ~kFlushes));
  }
  ~KeepDenormals() {
    if (before_ & kFlushes) asm volatile("msr fpcr, %0" : : "r"(before_));
  }

 private:
  static constexpr uint64_t kFlushes = (uint64_t{1} << 24) | (uint64_t{1} << 19);
  uint64_t before_;
#else
  KeepDenormals() {}
#endif

 public:
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;
};

}  // namespace ehrseq
