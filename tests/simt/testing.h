// SPDX-License-Identifier: BSD-3-Clause
// What the tests of kernels on the host share: memory whose every byte outside is caught, and checks that are counted.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "simt.h"

namespace simt {

// Exactly `size` elements, at first all bits set: NaN, or an index outside everything.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  explicit Buffer(int64_t size) : size_(size), bytes_(new char[bytes()]) { std::memset(bytes_.get(), 0xff, bytes()); }
  explicit Buffer(const std::vector<T>& values) : Buffer(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data());
  }
  T* data() { return reinterpret_cast<T*>(bytes_.get()); }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.get()); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  T* begin() { return data(); }
  T* end() { return data() + size_; }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
};

inline int64_t failures = 0;

// Counts what does not hold, and prints the first twenty of them.
[[gnu::format(printf, 2, 3)]] inline void check(bool holds, const char* text, ...) {
  if (holds || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, text);
  std::vprintf(text, arguments);
  va_end(arguments);
  std::printf("\n");
}

// The last line of a test's main.
inline int report(const char* test) {
  std::printf("%s: %s (%lld failures)\n", test, failures ? "FAILED" : "passed", static_cast<long long>(failures));
  return failures ? 1 : 0;
}

// The message of the simt::Error that `f` throws; empty if it throws none.
template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

// What a child process that runs `f` writes to stderr if the sanitizer, or anything else, ends it; empty if `f`
// returns.
template <class F>
std::string death_of(F f) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) return {};
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    f();
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(pipe_ends[0], part, sizeof(part))) > 0;) text.append(part, static_cast<size_t>(n));
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? std::string() : text + "(died)";
}

}  // namespace simt
