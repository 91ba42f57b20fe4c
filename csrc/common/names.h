// SPDX-License-Identifier: BSD-3-Clause
// For host code: the activations and the scores of routers by their names, read off the lists in activations.h and
// scores.h. A normal header, no vector code.
#pragma once

#include <string>
#include <string_view>

#include "dtypes.h"
#include "gate.h"

namespace ffn_ops {
namespace activation_list {
#include "activations.h"
}
namespace score_list {
#include "scores.h"
}

struct ActivationInfo {
  const char* name;
  OwnParams own;
  bool has_up;
  int learned;  // how many of `own` may be tensors with gradients
};

struct ScoreInfo {
  const char* name;
  bool of_row;
};

template <class Info, int kCount>
struct NamedList {
  static constexpr int kSize = kCount;
  Info rows[kCount];

  // The place of `name` in the list, or -1.
  constexpr int index(std::string_view name) const {
    for (int i = 0; i < kSize; ++i) {
      if (name == rows[i].name) return i;
    }
    return -1;
  }

  // The names of the rows that `wanted` accepts, with commas between them, for error messages.
  template <class Wanted>
  std::string names(const Wanted& wanted) const {
    std::string all;
    for (const Info& row : rows) {
      if (wanted(row)) all += (all.empty() ? "" : ", ") + std::string(row.name);
    }
    return all;
  }
  std::string names() const {
    return names([](const Info&) { return true; });
  }
};

template <class... As>
constexpr NamedList<ActivationInfo, sizeof...(As)> activations_of(TypeList<As...>) {
  return {{{As::name, As::own, As::has_up, As::learned}...}};
}

template <class... Ss>
constexpr NamedList<ScoreInfo, sizeof...(Ss)> scores_of(TypeList<Ss...>) {
  return {{{Ss::name, Ss::of_row}...}};
}

// Indexed like `dispatch_activation` and `dispatch_score`.
inline constexpr auto kActivations = activations_of(activation_list::Activations{});
inline constexpr auto kScores = scores_of(score_list::Scores{});

}  // namespace ffn_ops
