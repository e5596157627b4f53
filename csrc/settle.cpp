#include "settle.h"

#include <algorithm>
#include <cmath>

namespace renorm {
namespace {

// Law of total variance over the channels of a group; a group without an element weighs nothing.
struct Merged {
  double mean = 0, var = 0, count = 0;
};

Merged merge_channels(const Moments* channels, int64_t k) {
  if (k == 1) return {channels->mean, channels->var(), channels->count};
  Merged merged;
  for (int64_t c = 0; c < k; ++c) merged.mean += channels[c].mean / k;
  for (int64_t c = 0; c < k; ++c) {
    const double delta = channels[c].mean - merged.mean;
    merged.var += (channels[c].var() + delta * delta) / k;
  }
  merged.count = channels->count * k;
  return merged;
}

template <class A>
Merged merge_running(const Rule<A>& rule, int64_t first, int64_t k) {
  if (k == 1) return {rule.running_mean[first], rule.running_var[first], 1};
  Merged merged{0, 0, 1};
  for (int64_t c = first; c < first + k; ++c) merged.mean += double(rule.running_mean[c]) / k;
  for (int64_t c = first; c < first + k; ++c) {
    const double delta = rule.running_mean[c] - merged.mean;
    merged.var += (rule.running_var[c] + delta * delta) / k;
  }
  return merged;
}

// What the group is normalized by: (x - mean) * inverse_sigma * r + d.
struct Normalizer {
  double mean, inverse_sigma, r = 1, d = 0;
};

// Clipping that lets NaN through, as torch.clamp does.
double clip(double value, double low, double high) { return value < low ? low : value > high ? high : value; }

template <class A>
Normalizer corrected(const Rule<A>& rule, const Merged& group, const Merged& running) {
  const double sigma = std::sqrt(group.var + rule.eps), inverse_target = 1 / std::sqrt(running.var + rule.eps);
  return {group.mean, 1 / sigma, clip(sigma * inverse_target, 1 / rule.r_max, rule.r_max),
          clip((group.mean - running.mean) * inverse_target, -rule.d_max, rule.d_max)};
}

template <class A>
Normalizer weighed(const Rule<A>& rule, const Merged& example, const Merged& running) {
  const double alpha = example.count > 0 ? rule.example_weight : 0, difference = example.mean - running.mean;
  const double var =
      (1 - alpha) * running.var + alpha * example.var + alpha * (1 - alpha) * difference * difference;
  return {running.mean + alpha * difference, 1 / std::sqrt(var + rule.eps)};
}

template <class T>
Normalizer normalizer(const Forward<T>& problem, int64_t g, int64_t j, const Moments* channels) {
  const auto& rule = problem.rule;
  const int64_t k = problem.shape.channels_per_group;
  if (rule.source == Source::running) {
    const Merged running = merge_running(rule, j * k, k);
    return {running.mean, 1 / std::sqrt(running.var + rule.eps)};
  }
  const Merged group = merge_channels(channels, k);
  if (rule.source == Source::renorm) return corrected(rule, group, merge_running(rule, j * k, k));
  if (rule.source == Source::weighed) return weighed(rule, group, merge_running(rule, j * k, k));
  Normalizer result{group.mean, 1 / std::sqrt(group.var + rule.eps)};
  if (rule.source == Source::given) {
    const int64_t index = g * problem.shape.channel_groups() + j;
    result.r = rule.r[index];
    result.d = rule.d[index];
  }
  return result;
}

}  // namespace

template <class T>
void settle(const Forward<T>& problem, int64_t g, int64_t j, const Moments* channels) {
  using A = Accumulation<T>;
  const Shape& shape = problem.shape;
  const int64_t k = shape.channels_per_group;
  const Normalizer by = normalizer(problem, g, j, channels);
  // The part of the mean that A cannot hold goes to the offset: center + low is the mean.
  const A center = A(by.mean);
  const double low = by.mean - double(center), scale = by.inverse_sigma * by.r;
  const double offset = by.d - (std::isfinite(low) ? low * scale : 0);
  for (int64_t c = 0; c < k; ++c) {
    const int64_t channel = j * k + c, index = g * shape.channels + channel;
    const double gamma = problem.rule.weight ? double(problem.rule.weight[channel]) : 1;
    const double beta = problem.rule.bias ? double(problem.rule.bias[channel]) : 0;
    problem.coefficients.center[index] = center;
    problem.coefficients.scale[index] = A(gamma * scale);
    problem.coefficients.offset[index] = A(gamma * offset + beta);
    problem.coefficients.r[index] = A(by.r);
    problem.coefficients.d[index] = A(by.d);
    problem.coefficients.inverse_sigma[index] = A(by.inverse_sigma);
    if (!problem.mean) continue;
    problem.mean[index] = A(channels[c].mean);
    problem.var[index] = A(channels[c].var());
  }
  if (problem.count && j == 0) problem.count[g] = A(channels->count);
}

template <class T>
void settle(const Backward<T>& problem, int64_t g, int64_t j, const Sums* sums, Slopes<Accumulation<T>>* slopes,
            double* dweight, double* dbias) {
  using A = Accumulation<T>;
  const Shape& shape = problem.shape;
  const int64_t k = shape.channels_per_group, first = g * shape.channels + j * k;
  const double count = double(problem.count[g]) * k, share = 1 / std::max(count, 1.0);
  const double inverse_sigma = problem.coefficients.inverse_sigma[first];
  const double r = problem.coefficients.r[first], d = problem.coefficients.d[first];
  double low = 0;  // the group's mean less center
  for (int64_t c = 0; c < k; ++c) low += sums[c].centered * share;
  double mean_g = 0, mean_gz = 0;
  for (int64_t c = 0; c < k; ++c) {
    const double dot = sums[c].product - low * sums[c].gradient;  // sum of g * (x - mean)
    const double gamma = problem.weight ? double(problem.weight[j * k + c]) : 1;
    mean_g += gamma * sums[c].gradient * share;
    mean_gz += gamma * dot * inverse_sigma * share;
    dweight[c] = dot * inverse_sigma * r + sums[c].gradient * d;
    dbias[c] = sums[c].gradient;
  }
  // Through a single element no gradient flows, not even rounding.
  const double scale = count > 1 ? inverse_sigma * r : 0;
  const double slope = -scale * inverse_sigma * mean_gz, constant = -scale * mean_g - slope * low;
  for (int64_t c = 0; c < k; ++c) {
    const double gamma = problem.weight ? double(problem.weight[j * k + c]) : 1;
    slopes[c] = {A(gamma * scale), A(slope), A(constant)};
  }
}

#define RENORM_INSTANTIATE(T)                                                                                  \
  template void settle(const Forward<T>&, int64_t, int64_t, const Moments*);                                   \
  template void settle(const Backward<T>&, int64_t, int64_t, const Sums*, Slopes<Accumulation<T>>*, double*, double*);
RENORM_FOR_ELEMENTS(RENORM_INSTANTIATE)

}  // namespace renorm
