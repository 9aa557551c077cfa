// Definitions shared by host and device code of all backends.

#pragma once

#include <cstdint>
#include <type_traits>

namespace fastroute {

constexpr int64_t kMaxPaths = 8;

// The type of sums, gates and scores for paths of type T.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fastroute
