#include "tracking.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "moments.h"

namespace renorm {
namespace {

template <class A>
bool is_finite(const Batch<A>& batch) {
  int64_t others = 0;  // whose difference from themselves is not a number
  for (int64_t i = 0; i < batch.groups * batch.channels; ++i)
    others += !(batch.mean[i] - batch.mean[i] == 0) + !(batch.var[i] - batch.var[i] == 0);
  return others == 0;
}

// Adds to every channel the variance that belongs to the mean, weighed by counts, of the groups' standard deviations:
// the mean squared, less eps, in terms of variances, so that eps does not cancel.
template <class A>
void add_variance_of_mean_sigma(const Batch<A>& batch, double total, double eps, double* to) {
  std::vector<double> mean_sigma(batch.channels);
  for (int64_t g = 0; g < batch.groups; ++g) {
    const A* var = batch.var + g * batch.channels;
    const double share = batch.count[g] / total;
    for (int64_t c = 0; c < batch.channels; ++c) mean_sigma[c] += share * std::sqrt(var[c] + eps);
  }
  for (int64_t g = 0; g < batch.groups; ++g) {
    const A* var = batch.var + g * batch.channels;
    const double share = batch.count[g] / total;
    for (int64_t c = 0; c < batch.channels; ++c) {
      const double delta = std::sqrt(var[c] + eps) - mean_sigma[c];
      to[c] += share * (var[c] - delta * delta);
    }
  }
}

// The moments of all groups together.
template <class A>
Moments merge_groups(const Batch<A>& batch, double* rows) {
  const int64_t channels = batch.channels;
  Moments all{rows, rows + channels, 0};
  std::vector<double> own(2 * channels);
  for (int64_t g = 0; g < batch.groups; ++g) {
    const A *mean = batch.mean + g * channels, *var = batch.var + g * channels;
    const double count = batch.count[g];
    for (int64_t c = 0; c < channels; ++c) own[c] = mean[c];
    for (int64_t c = 0; c < channels; ++c) own[channels + c] = var[c] * count;
    all.merge({own.data(), own.data() + channels, count}, channels);
  }
  return all;
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
  std::vector<double> rows(3 * batch.channels);
  const Moments all = merge_groups(batch, rows.data());
  double* own = rows.data() + 2 * batch.channels;  // by the rule
  if (rule == Tracking::std && batch.groups > 1) add_variance_of_mean_sigma(batch, total, eps, own);
  for (int64_t c = 0; c < batch.channels; ++c) {
    const double before = running.var[c], away = all.mean[c] - running.mean[c];
    running.mean[c] = A(lerp(running.mean[c], all.mean[c], m));
    if (rule == Tracking::total) {
      running.var[c] = A(lerp(before, all.m2[c] / total, m) + m * (1 - m) * away * away);
    } else if (has_spread && rule == Tracking::var) {
      running.var[c] = A(lerp(before, all.m2[c] / (total - 1), m));
    } else if (has_spread) {
      const double var = batch.groups == 1 ? double(batch.var[c]) : own[c];
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
