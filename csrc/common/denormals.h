// What torch.set_flush_denormal(True) sets holds for the thread that called it alone: threads of
// one loop have to be set alike, or results would depend on which of them computes what.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace ehrseq {

// How the thread that makes this computes; a Scope makes another compute like it.
class FloatingMode {
 public:
  FloatingMode() : mode_(read()) {}

  class Scope {
   public:
    explicit Scope(const FloatingMode& of) : before_(read()), is_other_(before_ != of.mode_) {
      if (is_other_) write(of.mode_);
    }
    ~Scope() {
      if (is_other_) write(before_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    uint64_t before_;
    bool is_other_;
  };

 private:
#if defined(__SSE__)
  // Rounding, flushing and masks of exceptions; the lowest bits say which exceptions there were.
  static uint64_t read() { return _mm_getcsr() & ~0x3Fu; }
  static void write(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static uint64_t read() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void write(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static uint64_t read() { return 0; }
  static void write(uint64_t) {}
#endif

  uint64_t mode_;
};

// Arithmetic that keeps subnormal numbers, whatever the calling thread is set to: the small numbers
// of 16-bit types would be read as 0.
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
