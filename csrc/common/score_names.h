// SPDX-License-Identifier: BSD-3-Clause
// The names of the scores for host code, read off the one list in scores.h. A normal header, no vector code.
#pragma once

#include <string>
#include <string_view>

#include "dtypes.h"

namespace ffn_ops {
namespace score_list {
#include "scores.h"

struct Info {
  std::string_view name;
  bool of_row;
};

template <class... Ss>
struct Table {
  explicit constexpr Table(TypeList<Ss...>) {}
  static constexpr int kSize = sizeof...(Ss);
  Info rows[kSize] = {{Ss::name, Ss::of_row}...};
};
}  // namespace score_list

// Indexed like `dispatch_score`.
inline constexpr score_list::Table kScores{score_list::Scores{}};

// The index of `name` in the list, or -1.
constexpr int score_index(std::string_view name) {
  for (int i = 0; i < kScores.kSize; ++i) {
    if (name == kScores.rows[i].name) return i;
  }
  return -1;
}

// "softmax, sigmoid, ...", for error messages.
inline std::string score_names() {
  std::string names;
  for (const score_list::Info& score : kScores.rows) names += (names.empty() ? "" : ", ") + std::string(score.name);
  return names;
}

}  // namespace ffn_ops
