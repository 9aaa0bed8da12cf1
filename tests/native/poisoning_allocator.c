// Fills what an allocation returns with 0xFF and what is freed with 0x5A, so that a value read
// before it was written, or after it was freed, shows: 0xFF.. is a NaN in every floating-point type
// and a negative index in every signed one. Preloaded (LD_PRELOAD) over glibc's allocator, because
// memory that C++ asks for is reached in no other way.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stddef.h>
#include <string.h>

// glibc's own, which its malloc and the others are names of
extern void* __libc_malloc(size_t size);
extern void* __libc_realloc(void* memory, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* memory);

static const int kFresh = 0xFF;
static const int kFreed = 0x5A;
// Of a larger allocation only so much at both ends: touching all of it would cost memory that the
// program never meant to use.
static const size_t kMostFilled = (size_t)256 << 20;

static void fill(void* memory, int pattern, size_t begin, size_t end) {
  char* const bytes = memory;
  if (end - begin <= kMostFilled) {
    memset(bytes + begin, pattern, end - begin);
    return;
  }
  memset(bytes + begin, pattern, kMostFilled / 2);
  memset(bytes + end - kMostFilled / 2, pattern, kMostFilled / 2);
}

static void* filled(void* memory) {
  if (memory != NULL) fill(memory, kFresh, 0, malloc_usable_size(memory));
  return memory;
}

void* malloc(size_t size) { return filled(__libc_malloc(size)); }

void* memalign(size_t alignment, size_t size) { return filled(__libc_memalign(alignment, size)); }

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** memory, size_t alignment, size_t size) {
  if (alignment % sizeof(void*) != 0 || (alignment & (alignment - 1)) != 0 || alignment == 0) {
    return EINVAL;
  }
  const int before = errno;
  void* const got = memalign(alignment, size);
  errno = before;
  if (got == NULL) return ENOMEM;
  *memory = got;
  return 0;
}

void* realloc(void* memory, size_t size) {
  const size_t before = memory == NULL ? 0 : malloc_usable_size(memory);
  void* const got = __libc_realloc(memory, size);
  if (got != NULL) {
    const size_t after = malloc_usable_size(got);
    if (after > before) fill(got, kFresh, before, after);
  }
  return got;
}

void free(void* memory) {
  if (memory == NULL) return;
  const int before = errno;
  fill(memory, kFreed, 0, malloc_usable_size(memory));
  __libc_free(memory);
  errno = before;
}
