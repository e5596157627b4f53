#include "tracking.h"

#include <algorithm>
#include <cmath>

#include "moments.h"

namespace renorm {
namespace {

template <class A>
bool is_finite(const Batch<A>& batch) {
  A sum = 0;  // 0 times anything else is not a number
  for (int64_t i = 0; i < batch.groups * batch.channels; ++i) sum += 0 * batch.mean[i] + 0 * batch.var[i];
  return sum == 0;
}

// Count-weighted mean over the groups of the channel's standard deviation, squared, less eps.
template <class A>
double variance_of_mean_sigma(const Batch<A>& batch, int64_t c, double total, double eps) {
  double mean_sigma = 0;
  for (int64_t g = 0; g < batch.groups; ++g)
    mean_sigma += batch.count[g] / total * std::sqrt(batch.var[g * batch.channels + c] + eps);
  double var = 0;  // in terms of variances, so that eps does not cancel
  for (int64_t g = 0; g < batch.groups; ++g) {
    const double own = batch.var[g * batch.channels + c], delta = std::sqrt(own + eps) - mean_sigma;
    var += batch.count[g] / total * (own - delta * delta);
  }
  return var;
}

double lerp(double from, double to, double weight) { return from + (to - from) * weight; }

}  // namespace

template <class A>
void track(const Running<A>& running, const Batch<A>& batch, Tracking rule, double momentum, int64_t channels_per_group,
           double eps) {
  if (!is_finite(batch)) {
    ++*running.skipped;
    return;
  }
  double total = 0, largest = 0;
  for (int64_t g = 0; g < batch.groups; ++g) {
    total += batch.count[g];
    largest = std::max<double>(largest, batch.count[g]);
  }
  if (total == 0) return;
  const double m = momentum < 0 ? 1.0 / double(*running.steps + 1) : momentum;
  const bool has_spread = largest * channels_per_group > 1 && total > 1;
  for (int64_t c = 0; c < batch.channels; ++c) {
    Moments all;
    for (int64_t g = 0; g < batch.groups; ++g) {
      const int64_t i = g * batch.channels + c;
      all.merge(batch.mean[i], double(batch.var[i]) * batch.count[g], batch.count[g]);
    }
    const double before = running.var[c], away = all.mean - running.mean[c];
    running.mean[c] = A(lerp(running.mean[c], all.mean, m));
    if (rule == Tracking::total) {
      running.var[c] = A(lerp(before, all.var(), m) + m * (1 - m) * away * away);
    } else if (has_spread && rule == Tracking::var) {
      running.var[c] = A(lerp(before, all.m2 / (total - 1), m));
    } else if (has_spread) {
      const double var = batch.groups == 1 ? double(batch.var[c]) : variance_of_mean_sigma(batch, c, total, eps);
      // The square of the moving average of sigma, less eps.
      const double between = std::sqrt(var + eps) - std::sqrt(before + eps);
      running.var[c] = A(lerp(before, var, m) - m * (1 - m) * between * between);
    }
  }
  ++*running.steps;
}

template void track(const Running<float>&, const Batch<float>&, Tracking, double, int64_t, double);
template void track(const Running<double>&, const Batch<double>&, Tracking, double, int64_t, double);

}  // namespace renorm
