#include "common/amx.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if EHRSEQ_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if EHRSEQ_HAS_ISAS
// GCC 12 says it of its own intrinsics, which begin with a vector that they do not set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace ehrseq::amx_tiles {
namespace detail {

bool in_memory = false;
__thread Shapes shapes = {0, 0};

namespace {

constexpr int kTiles = 8;
constexpr int kMostRows = 16;
constexpr int kRowBytes = 64;

// What ldtilecfg reads.
struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t first_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t of_rows, int64_t packs) {
    rows[tile] = packs > 0 ? static_cast<uint8_t>(of_rows) : 0;
    row_bytes[tile] = of_rows > 0 ? static_cast<uint16_t>(packs * 4) : 0;
  }
};

Configuration configuration(int64_t rows, int64_t rest) {
  Configuration result;
  for (int tile = 0; tile < kLeft; ++tile) result.set(tile, rows, kPacks);
  result.set(kLeft, rows, kPacks);
  result.set(kLeftRest, rows, rest);
  result.set(kRight, kPacks, kPacks);
  result.set(kRightRest, rest, kPacks);
  return result;
}

struct Emulated {
  Configuration is;
  alignas(64) unsigned char bytes[kTiles][kMostRows][kRowBytes];
};

thread_local Emulated emulated;

[[noreturn]] void fail(const char* what, int tile) {
  std::fprintf(stderr, "emulated AMX: %s (tile %d)\n", what, tile);
  std::abort();
}

void expect_configured(int tile) {
  if (shapes.rows == 0) fail("used outside of a session", tile);
  if (emulated.is.rows[tile] == 0) fail("used without a shape", tile);
}

}  // namespace

void set_shapes(int64_t rows, int64_t rest) {
  const Configuration is = configuration(rows, rest);
  if (in_memory) {
    if (rows < 1 || rows > kMostRows || rest < 0 || rest >= kPacks) fail("no such shape", -1);
    // As the instruction does, but for zeros in place of what nothing should read.
    std::memset(emulated.bytes, 0xFF, sizeof(emulated.bytes));
    emulated.is = is;
  } else {
#if EHRSEQ_HAS_AMX
    asm volatile("ldtilecfg %0" : : "m"(is));
#endif
  }
  shapes = {rows, rest};
}

void release() {
  shapes = {0, 0};
  if (in_memory) return;
#if EHRSEQ_HAS_AMX
  asm volatile("tilerelease");
#endif
}

void emulated_load(int tile, const void* from, int64_t stride) {
  expect_configured(tile);
  for (int row = 0; row < emulated.is.rows[tile]; ++row) {
    std::memset(emulated.bytes[tile][row], 0, kRowBytes);
    std::memcpy(emulated.bytes[tile][row], static_cast<const char*>(from) + row * stride,
                emulated.is.row_bytes[tile]);
  }
}

void emulated_store(int tile, void* to, int64_t stride) {
  expect_configured(tile);
  for (int row = 0; row < emulated.is.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulated.bytes[tile][row],
                emulated.is.row_bytes[tile]);
  }
}

#if EHRSEQ_HAS_ISAS
namespace {

__attribute__((target("avx512f"))) __m512 first_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}

__attribute__((target("avx512f"))) __m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000))));
}

// The sums over the first and over the second values of all packs, each a chain of fused
// multiplications and additions, are added to one another and then to what was there: Intel 64 and
// IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.
__attribute__((target("avx512f"), noinline)) void multiply_row(const unsigned char* left,
                                                               const unsigned char (*right)[64],
                                                               int packs, unsigned char* sums) {
  __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
  for (int pack = 0; pack < packs; ++pack) {
    int pair;
    std::memcpy(&pair, left + 4 * pack, sizeof(pair));
    const __m512i factor = _mm512_set1_epi32(pair);
    const __m512i weights = _mm512_loadu_si512(right[pack]);
    first = _mm512_fmadd_ps(first_of(factor), first_of(weights), first);
    second = _mm512_fmadd_ps(second_of(factor), second_of(weights), second);
  }
  const __m512 before = _mm512_loadu_ps(sums);
  _mm512_storeu_ps(sums, _mm512_add_ps(before, _mm512_add_ps(first, second)));
}

}  // namespace

void emulated_multiply(int sums, int left, int right) {
  for (const int tile : {sums, left, right}) expect_configured(tile);
  const Configuration& is = emulated.is;
  if (is.rows[sums] != is.rows[left] || is.row_bytes[left] != 4 * is.rows[right]) {
    fail("shapes of factors do not fit", left);
  }
  // Rounds to nearest, and takes subnormal numbers for zeros, whatever this thread is set to.
  constexpr unsigned kFlushesToZero = 0x8040, kRounding = 0x6000;
  const unsigned mode = _mm_getcsr();
  _mm_setcsr((mode | kFlushesToZero) & ~kRounding);
  for (int row = 0; row < is.rows[sums]; ++row) {
    multiply_row(emulated.bytes[left][row], emulated.bytes[right], is.rows[right],
                 emulated.bytes[sums][row]);
  }
  _mm_setcsr(mode);
}
#else
void emulated_multiply(int, int, int) { fail("not compiled for this CPU", -1); }
#endif

}  // namespace detail

namespace {

// Integers up to 8, and sums of their products, are exact in whatever order they are added. All
// tiles and shapes that kernels use are in it: some rows, a full group of packs and a rest.
template <int... v>
bool multiplies_integers(std::integer_sequence<int, v...>) {
  constexpr int kRows = 13, kRest = 3, kUsed = kPacks + kRest, kColumns = 16;
  constexpr int kVectors = sizeof...(v);
  uint16_t left[kRows][kUsed][2], right[kUsed][kVectors][kColumns][2];
  int of_left[kRows][kUsed][2], of_right[kUsed][kVectors][kColumns][2];
  float sums[kRows][kVectors][kColumns];
  int next = 1;
  const auto draw = [&next](int& integer, uint16_t& stored) {
    next = (next * 13 + 7) % 101;
    integer = next % 17 - 8;
    const float value = static_cast<float>(integer);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    stored = static_cast<uint16_t>(bits >> 16);
  };
  const auto start = [](int row, int vector, int column) {
    return row + 100 * vector - 2 * column;
  };
  for (int k = 0; k < 2 * kUsed; ++k) {
    for (int row = 0; row < kRows; ++row) {
      draw(of_left[row][k / 2][k % 2], left[row][k / 2][k % 2]);
    }
    for (int at = 0; at < kVectors * kColumns; ++at) {
      draw(of_right[k / 2][at / kColumns][at % kColumns][k % 2],
           right[k / 2][at / kColumns][at % kColumns][k % 2]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int at = 0; at < kVectors * kColumns; ++at) {
      sums[row][at / kColumns][at % kColumns] = start(row, at / kColumns, at % kColumns);
    }
  }
  {
    const Session session;
    set_shapes(kRows, kRest);
    (load<v>(sums[0][v], sizeof(sums[0])), ...);
    load<kLeft>(left, sizeof(left[0]));
    load<kLeftRest>(left[0][kPacks], sizeof(left[0]));
    ((load<kRight>(right[0][v], sizeof(right[0])), multiply<v, kLeft, kRight>()), ...);
    ((load<kRightRest>(right[kPacks][v], sizeof(right[0])), multiply<v, kLeftRest, kRightRest>()),
     ...);
    (store<v>(sums[0][v], sizeof(sums[0])), ...);
  }
  for (int row = 0; row < kRows; ++row) {
    for (int at = 0; at < kVectors * kColumns; ++at) {
      const int vector = at / kColumns, column = at % kColumns;
      int expected = start(row, vector, column);
      for (int k = 0; k < 2 * kUsed; ++k) {
        expected += of_left[row][k / 2][k % 2] * of_right[k / 2][vector][column][k % 2];
      }
      if (sums[row][vector][column] != static_cast<float>(expected)) return false;
    }
  }
  return true;
}

bool multiplies_integers() { return multiplies_integers(std::make_integer_sequence<int, kLeft>{}); }

const char* found_out() {
#if EHRSEQ_HAS_AMX
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kBFloat16) || !(edx & kTiles)) {
    return "this CPU has none";
  }
  if (!__builtin_cpu_supports("avx512bf16")) return "this CPU has it without AVX512-BF16";
  // The state of the tiles is large, and Linux gives it to those that ask: see "Using XSTATE
  // features in user space applications" in its documentation.
  constexpr long kAskForState = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kAskForState, kTileData) != 0) {
    return "the operating system does not let this process use it";
  }
  if (!multiplies_integers()) return "its products of small integers are wrong here";
  return nullptr;
#else
  return "not compiled for this platform";
#endif
}

}  // namespace

const char* why_not() {
  static const char* const reason = found_out();
  return reason;
}

void emulate() {
  detail::in_memory = true;
  if (!multiplies_integers()) {
    std::fprintf(stderr, "emulated AMX: wrong products of integers\n");
    std::abort();
  }
}

bool is_emulated() { return detail::in_memory; }

}  // namespace ehrseq::amx_tiles
