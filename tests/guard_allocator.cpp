// SPDX-License-Identifier: BSD-3-Clause
// Preloaded by test_memory.py: every aligned allocation (tensors, the operators' workspace) ends at a page that cannot
// be touched, what alignment leaves free around it holds a pattern that `free` checks, and fresh memory reads as NaN.
// A write or a read behind a tensor is a segmentation fault, a write into the gap an abort. glibc on Linux.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" void __libc_free(void*);
extern "C" void* __libc_memalign(size_t, size_t);

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kRegion = size_t{1} << 38;  // addresses, handed out once each
constexpr size_t kLargestGuarded = size_t{1} << 28;
constexpr unsigned char kPattern = 0xA5;

struct Block {
  char* begin;  // of the pages
  size_t bytes;
  size_t size;
};

char* region = nullptr;
Block* blocks = nullptr;  // by the page of the data pointer
std::atomic<size_t> used{0};
std::atomic<long> count{0};

void reserve() {
  const auto map = [](size_t bytes, int protection) {
    return mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  void* table = map(kRegion / kPage * sizeof(Block), PROT_READ | PROT_WRITE);
  void* space = map(kRegion, PROT_NONE);
  if (table == MAP_FAILED || space == MAP_FAILED) std::abort();
  blocks = static_cast<Block*>(table);
  region = static_cast<char*>(space);
}

[[noreturn]] void fail(const char* message) {
  if (write(2, message, std::strlen(message)) < 0) _exit(3);
  std::abort();
}

void* guarded(size_t alignment, size_t size) {
  static const bool ready = (reserve(), true);
  (void)ready;
  const size_t step = alignment > kPage ? alignment : kPage;
  const size_t bytes = (size + step - 1) / step * step;
  const size_t first = used.fetch_add(bytes + 2 * step + kPage);
  if (first + bytes + 3 * step > kRegion) return __libc_memalign(alignment, size);
  const auto base = (reinterpret_cast<uintptr_t>(region + first) + step - 1) / step * step;
  char* begin = reinterpret_cast<char*>(base);
  if (mprotect(begin, bytes, PROT_READ | PROT_WRITE) != 0) return __libc_memalign(alignment, size);
  char* data = begin + (bytes - size) / alignment * alignment;
  std::memset(begin, kPattern, static_cast<size_t>(data - begin));
  std::memset(data, 0xFF, size);
  std::memset(data + size, kPattern, static_cast<size_t>(begin + bytes - data) - size);
  blocks[static_cast<size_t>(data - region) / kPage] = {begin, bytes, size};
  ++count;
  return data;
}

}  // namespace

extern "C" {

long guarded_blocks() { return count.load(); }

int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = size == 0 || size > kLargestGuarded ? __libc_memalign(alignment, size) : guarded(alignment, size);
  return *out ? 0 : ENOMEM;
}

void* aligned_alloc(size_t alignment, size_t size) {
  void* data = nullptr;
  return posix_memalign(&data, alignment, size) == 0 ? data : nullptr;
}

void free(void* pointer) {
  char* data = static_cast<char*>(pointer);
  if (!region || data < region || data >= region + kRegion) {
    __libc_free(pointer);
    return;
  }
  const Block block = blocks[static_cast<size_t>(data - region) / kPage];
  for (const char* p = block.begin; p < block.begin + block.bytes; ++p) {
    if (p >= data && p < data + block.size) p = data + block.size;
    if (p < block.begin + block.bytes && static_cast<unsigned char>(*p) != kPattern) fail("guard band overwritten\n");
  }
  madvise(block.begin, block.bytes, MADV_DONTNEED);
  mprotect(block.begin, block.bytes, PROT_NONE);
}
}
