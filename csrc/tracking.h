// How the running statistics move. One call per layer and step; no vector code.
#pragma once

#include <cstdint>

namespace renorm {

// A rule, and its name at the same place.
enum class Tracking { std, var, total };
constexpr const char* kTrackingNames[] = {"std", "var", "total"};
static_assert(sizeof(kTrackingNames) / sizeof(*kTrackingNames) == int(Tracking::total) + 1, "every rule has its name");

template <class A>
struct Running {
  A *mean, *var;             // (C,)
  int64_t *steps, *skipped;  // batches that counted, and that were left out as not finite
};

template <class A>
struct Batch {
  const A *mean, *var, *count;  // (G, C), (G, C), (G,)
  int64_t groups, channels;
};

// Moves the statistics by one batch, by the rules of ops/tracking.py. A momentum below 0 stands for the cumulative
// average.
template <class A>
void track(const Running<A>& running, const Batch<A>& batch, Tracking rule, double momentum, int64_t channels_per_group,
           double eps);

}  // namespace renorm
