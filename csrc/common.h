// What host and device code of every backend agree on.

#pragma once

#include <cstdint>
#include <type_traits>

namespace fastroute {

constexpr int64_t kMaxPaths = 8;

// The type in which sums, gates and scores of T paths are held.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

}  // namespace fastroute
