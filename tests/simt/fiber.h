// SPDX-License-Identifier: BSD-3-Clause
// Call stacks between which one OS thread switches, registered with the address sanitizer. Independent of CUDA.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

// A point of execution that can be gone back to: the thread's own stack, or that of a fiber.
struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // the sanitizer's
};

#ifdef __x86_64__
// Saves what the calling convention wants kept, and continues where `load` was saved. swapcontext would do, but its
// system call for the signal mask takes ten times as long.
[[gnu::naked, gnu::noinline, gnu::no_sanitize("address", "undefined")]] inline void swap_stacks(
    [[maybe_unused]] void** save, [[maybe_unused]] void* load) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

[[gnu::noinline, gnu::no_sanitize("address")]] inline void switch_context(Context& from, Context& to,
                                                                          bool for_good = false) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#ifdef __x86_64__
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// A stack with a guard page. It serves many calls, one after the other.
class Fiber {
 public:
  using Entry = void (*)();

  Fiber() {
    memory_ = static_cast<char*>(
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_, kGuard, PROT_NONE) != 0) {
      std::perror("simt: a fiber's stack");
      std::abort();
    }
    context_.bottom = memory_ + kGuard;
    context_.bytes = kStack;
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    unpoison();
    munmap(memory_, kGuard + kStack);
  }

  // The next switch here enters `entry`, which calls `entered()` first and never returns.
  void prepare(Entry entry) {
    context_.fake_stack = nullptr;
#ifdef __x86_64__
    // As swap_stacks finds it: six registers, the place to return to; and the end of the chain of callers, whose
    // position is that of a return address, so that `entry` finds the stack aligned.
    void** top = reinterpret_cast<void**>(memory_ + kGuard + kStack) - 1;
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(entry);
    for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
    context_.stack_pointer = top - 7;
#else
    getcontext(&context_.state);
    context_.state.uc_stack = {memory_ + kGuard, 0, kStack};
    context_.state.uc_link = nullptr;
    makecontext(&context_.state, entry, 0);
#endif
  }

  // What an abandoned call left marked.
  void unpoison() { __asan_unpoison_memory_region(memory_ + kGuard, kStack); }

  Context& context() { return context_; }

 private:
  static constexpr size_t kGuard = 1 << 16, kStack = 1 << 18;
  char* memory_;
  Context context_;
};

// The first call of a fiber's entry. It records the extent of the previous stack in `from`.
inline void entered(Context& from) { __sanitizer_finish_switch_fiber(nullptr, &from.bottom, &from.bytes); }

}  // namespace simt
