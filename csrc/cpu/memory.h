// SPDX-License-Identifier: BSD-3-Clause
// Memory of the operators on the CPU: the workspace of a call, the blocks kept for later calls, and the error when
// memory runs out. Tensors are torch's own (ops.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>
#include <vector>

namespace ffn_ops {

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

// Memory for one call, handed out piece by piece and given back together. Touching fresh pages costs more than
// computing what goes into them, so the block is kept for the next call: one for each call that runs at the same time.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();
  void* take(size_t bytes, const char* what);  // `what`: for the error message

 private:
  std::vector<Block> blocks_;
  size_t used_ = 0;   // of the last block
  size_t taken_ = 0;  // in all
};

// Asks for huge pages behind large fresh memory: one fault for 2 MiB in place of 512.
void advise_huge_pages(void* data, size_t bytes);

// Moves memory in use onto huge pages, in its place. Gives the bytes of it that lie on them then.
int64_t move_to_huge_pages(const void* data, size_t bytes);

// Frees all kept blocks.
void empty_cache();
int64_t cached_bytes();

// The largest number of kept bytes. Below 0: FFN_OPS_CACHE_LIMIT, or 384 MiB.
void set_cache_limit(int64_t bytes);
int64_t cache_limit();

[[noreturn]] void out_of_memory(size_t bytes, const std::string& what);

// Calls `allocate`, which returns whether it got `bytes`. If not, frees the kept blocks and calls it again.
template <class Allocate, class What>
void allocate_or_fail(size_t bytes, const What& what, const Allocate& allocate) {
  if (allocate()) return;
  empty_cache();
  if (!allocate()) out_of_memory(bytes, what());
}

}  // namespace ffn_ops
