// SPDX-License-Identifier: BSD-3-Clause
// See memory.h. Nothing here waits for a lock, because the holder would not exist in a forked child: a slot that is
// held is passed over.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include <torch/headeronly/util/Exception.h>

namespace ffn_ops {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallest = size_t{4} << 20;  // block; and memory that huge pages are worth asking for
constexpr int64_t kDefaultLimit = int64_t{384} << 20;
constexpr int kLooks = 64;  // at held slots: held for nanoseconds, or for ever in a forked child

// A slot for one kept block. A thread that finds it held tries the next.
struct Slot {
  std::atomic<bool> held{false};
  Block block;
};
Slot slots[32];
std::atomic<int64_t> kept{0};    // bytes in the slots
std::atomic<int64_t> limit{-1};  // -1: from the environment, read when it is needed

// Holds a slot for as long as it lives.
class Hold {
 public:
  Hold() = default;
  explicit Hold(Slot& slot) : slot_(slot.held.exchange(true, std::memory_order_acquire) ? nullptr : &slot) {}
  Hold(const Hold&) = delete;
  Hold& operator=(Hold&& other) noexcept {
    std::swap(slot_, other.slot_);
    return *this;
  }
  ~Hold() {
    if (slot_) slot_->held.store(false, std::memory_order_release);
  }
  explicit operator bool() const { return slot_ != nullptr; }
  size_t bytes() const { return slot_ ? slot_->block.bytes : 0; }
  Block take() {
    kept.fetch_sub(static_cast<int64_t>(bytes()), std::memory_order_relaxed);
    return std::exchange(slot_->block, {});
  }
  void put(const Block& block) { slot_->block = block; }

 private:
  Slot* slot_ = nullptr;
};

size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// Allocates memory without touching it; null if there is none.
char* fresh_block(size_t bytes) {
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (data) advise_huge_pages(data, bytes);
  return static_cast<char*>(data);
}

// Takes the smallest kept block that is large enough. If there is none, frees the largest to make room for a new one.
Block take_block(size_t bytes, const char* what) {
  (void)cache_limit();  // a wrong value raises here, not when the block is returned
  bytes = round_up(std::max(bytes, kSmallest), kHugePage);
  Hold best;
  bool passed_by = true;
  for (int looks = 0; looks < kLooks && passed_by && !best; ++looks) {
    passed_by = false;
    for (Slot& slot : slots) {
      Hold each(slot);
      passed_by = passed_by || !each;
      if (!each.bytes()) continue;
      const bool fits = each.bytes() >= bytes, best_fits = best.bytes() >= bytes;
      if (!best || (fits ? !best_fits || each.bytes() < best.bytes() : !best_fits && each.bytes() > best.bytes()))
        best = std::move(each);
    }
  }
  if (best) {
    const Block block = best.take();
    if (block.bytes >= bytes) return block;
    std::free(block.data);
  }
  Block block;
  allocate_or_fail(
      bytes, [&] { return std::string("the workspace: ") + what; },
      [&] {
        block = {fresh_block(bytes), bytes};
        return block.data != nullptr;
      });
  return block;
}

void give_back(const Block& block) {
  const auto bytes = static_cast<int64_t>(block.bytes);
  if (kept.fetch_add(bytes, std::memory_order_relaxed) + bytes <= cache_limit()) {
    for (Slot& slot : slots) {
      Hold hold(slot);
      if (!hold || hold.bytes()) continue;
      hold.put(block);
      return;
    }
  }
  kept.fetch_sub(bytes, std::memory_order_relaxed);
  std::free(block.data);
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
  if (bytes < kSmallest) return;
  const auto begin = round_up(reinterpret_cast<uintptr_t>(data), kHugePage);
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
#ifdef MADV_HUGEPAGE
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

int64_t move_to_huge_pages(const void* data, size_t bytes) {
  int64_t moved = 0;
#ifdef __linux__
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1; C libraries before it have no name for it
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  for (uintptr_t page = begin / kHugePage * kHugePage; bytes > 0 && page < end; page += kHugePage) {
    if (madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse) == 0)
      moved += static_cast<int64_t>(std::min<uintptr_t>(end, page + kHugePage) - std::max<uintptr_t>(begin, page));
  }
#endif
  return moved;
}

void empty_cache() {
  for (Slot& slot : slots) {
    Hold hold(slot);
    if (hold.bytes()) std::free(hold.take().data);
  }
}

int64_t cached_bytes() { return std::max<int64_t>(0, kept.load(std::memory_order_relaxed)); }

void set_cache_limit(int64_t bytes) {
  limit.store(std::max<int64_t>(bytes, -1), std::memory_order_relaxed);
  if (cached_bytes() > cache_limit()) empty_cache();
}

int64_t cache_limit() {
  int64_t bytes = limit.load(std::memory_order_relaxed);
  if (bytes >= 0) return bytes;
  const char* text = std::getenv("FFN_OPS_CACHE_LIMIT");
  if (text && *text) {
    char* end = nullptr;
    errno = 0;
    bytes = std::strtoll(text, &end, 10);
    STD_TORCH_CHECK(errno == 0 && !*end && bytes >= 0, "FFN_OPS_CACHE_LIMIT: expected a number of bytes, got '", text,
                    "'");
  } else {
    bytes = kDefaultLimit;
  }
  limit.store(bytes, std::memory_order_relaxed);
  return bytes;
}

void out_of_memory(size_t bytes, const std::string& what) {
  STD_TORCH_CHECK(false, "ffn_ops: not enough memory on the CPU: tried to allocate ", bytes, " bytes for ", what);
  std::abort();
}

void* Workspace::take(size_t bytes, const char* what) {
  bytes = round_up(std::max<size_t>(bytes, 1), 128);
  if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) {
    blocks_.push_back(take_block(bytes, what));
    used_ = 0;
  }
  void* data = blocks_.back().data + used_;
  used_ += bytes;
  taken_ += bytes;
  return data;
}

Workspace::~Workspace() {
  if (blocks_.size() == 1) {
    give_back(blocks_[0]);
    return;
  }
  // With several blocks: the next call gets one that holds everything.
  for (const Block& block : blocks_) std::free(block.data);
  const size_t bytes = round_up(taken_, kHugePage);
  if (bytes == 0 || static_cast<int64_t>(bytes) > cache_limit()) return;
  if (char* data = fresh_block(bytes)) give_back({data, bytes});
}

}  // namespace ffn_ops
