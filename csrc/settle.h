// From the sums over a group to the coefficients of the pass over its data, for several channel groups at once: loops
// over channels, each short enough that the compiler makes vectors of it.

namespace renorm {
namespace RENORM_ISA {

// Sums over the channels of a group, with g the gradient of the normalized output.
struct Sums {
  double *gradient, *centered, *product;  // of g, of x - center, of their product

  Sums(double* rows, int64_t stride) : gradient(rows), centered(rows + stride), product(rows + 2 * stride) {}
  static constexpr int64_t rows = 3;
};

// dx = g * gradient + (x - center) * centered + constant
template <class A>
struct Slopes {
  A *gradient, *centered, *constant;

  Slopes(A* rows, int64_t stride) : gradient(rows), centered(rows + stride), constant(rows + 2 * stride) {}
  static constexpr int64_t rows = 3;
};

// to[c] = value(c, j) for every channel c of groups of k, the j-th
template <class A, class F>
RENORM_INLINE void for_channels(A* __restrict to, int64_t groups, int64_t k, F&& value) {
  if (k == 1) {
    for (int64_t c = 0; c < groups; ++c) to[c] = A(value(c, c));
    return;
  }
  for (int64_t j = 0; j < groups; ++j)
    for (int64_t c = j * k; c < (j + 1) * k; ++c) to[c] = A(value(c, j));
}

// to[j] = the sum of value(c, j) over the channels c of the j-th group of k
template <class F>
RENORM_INLINE void sum_channels(double* __restrict to, int64_t groups, int64_t k, F&& value) {
  if (k == 1) {
    for (int64_t j = 0; j < groups; ++j) to[j] = value(j, j);
    return;
  }
  for (int64_t j = 0; j < groups; ++j) {
    double totals[4] = {};  // one would wait for its own additions
    int64_t c = j * k;
    for (; c + 4 <= (j + 1) * k; c += 4)
      for (int64_t i = 0; i < 4; ++i) totals[i] += value(c + i, j);
    for (; c < (j + 1) * k; ++c) totals[0] += value(c, j);
    to[j] = (totals[0] + totals[1]) + (totals[2] + totals[3]);
  }
}

// Law of total variance over the channels of each group.
template <class A>
void merge_channels(const A* mean, const A* var, int64_t groups, int64_t k, double* to_mean, double* to_var) {
  const double each = 1.0 / k;
  sum_channels(to_mean, groups, k, [&](int64_t c, int64_t) RENORM_LAMBDA { return mean[c] * each; });
  sum_channels(to_var, groups, k, [&](int64_t c, int64_t j) RENORM_LAMBDA {
    const double delta = k == 1 ? 0 : mean[c] - to_mean[j];
    return (var[c] + delta * delta) * each;
  });
}

// Clipping that lets NaN through, as torch.clamp does.
RENORM_INLINE double clip(double value, double low, double high) { return value < low ? low : value > high ? high : value; }

// What groups are normalized by: (x - mean) / sqrt(var + eps) * r + d.
struct Normalizers {
  double *mean, *var, *r, *d;

  Normalizers(double* rows, int64_t stride) : mean(rows), var(rows + stride), r(rows + 2 * stride), d(rows + 3 * stride) {}
  static constexpr int64_t rows = 4;
};

template <class A>
void correct(const Rule<A>& rule, const double* mean, const double* var, int64_t groups, const Normalizers& by) {
  const double eps = rule.eps, r_max = rule.r_max, r_min = 1 / rule.r_max, d_max = rule.d_max;
  for (int64_t j = 0; j < groups; ++j) {
    const double inverse_target = 1 / __builtin_sqrt(var[j] + eps);
    by.r[j] = clip(__builtin_sqrt(by.var[j] + eps) * inverse_target, r_min, r_max);
    by.d[j] = clip((by.mean[j] - mean[j]) * inverse_target, -d_max, d_max);
  }
}

// Weighs the moments of examples with the running ones.
inline void weigh(double alpha, const double* mean, const double* var, int64_t groups, const Normalizers& by) {
  for (int64_t j = 0; j < groups; ++j) {
    const double difference = by.mean[j] - mean[j];
    by.var[j] = (1 - alpha) * var[j] + alpha * by.var[j] + alpha * (1 - alpha) * difference * difference;
    by.mean[j] = mean[j] + alpha * difference;
  }
}

// Writes moments and coefficients of `channels` channels from `first` on, whole channel groups of example group `g`.
// `batch` are theirs, or null where the source needs none.
template <class T>
void settle(const Forward<T>& problem, int64_t g, int64_t first, int64_t channels, const Moments* batch) {
  using A = Accumulation<T>;
  const Rule<A>& rule = problem.rule;
  const int64_t k = problem.shape.channels_per_group, groups = channels / k;
  Buffer<double> numbers((Normalizers::rows + 4) * groups + channels);
  const Normalizers by(numbers.data, groups);
  double *mean = numbers.data + Normalizers::rows * groups, *var = mean + groups;
  double *scale = var + groups, *offset = scale + groups;
  double* each_var = offset + groups;
  if (batch) {
    batch->write_var(each_var, channels);
    merge_channels<double>(batch->mean, each_var, groups, k, by.mean, by.var);
  }
  for (int64_t j = 0; j < groups; ++j) by.r[j] = 1;
  for (int64_t j = 0; j < groups; ++j) by.d[j] = 0;
  if (rule.source == Source::running) {
    merge_channels(rule.running_mean + first, rule.running_var + first, groups, k, by.mean, by.var);
  } else if (rule.source == Source::renorm || rule.source == Source::weighed) {
    merge_channels(rule.running_mean + first, rule.running_var + first, groups, k, mean, var);
    if (rule.source == Source::renorm) correct(rule, mean, var, groups, by);
    else weigh(batch->count > 0 ? rule.example_weight : 0, mean, var, groups, by);
  } else if (rule.source == Source::given) {
    const int64_t index = g * problem.shape.channel_groups() + first / k;
    for (int64_t j = 0; j < groups; ++j) by.r[j] = rule.r[index + j];
    for (int64_t j = 0; j < groups; ++j) by.d[j] = rule.d[index + j];
  }
  // The part of the mean that A cannot hold goes to the offset: center + low is the mean.
  double* inverse_sigma = by.var;
  for (int64_t j = 0; j < groups; ++j) {
    const double low = by.mean[j] - double(A(by.mean[j]));
    inverse_sigma[j] = 1 / __builtin_sqrt(by.var[j] + rule.eps);
    scale[j] = inverse_sigma[j] * by.r[j];
    offset[j] = by.d[j] - (low - low == 0 ? low * scale[j] : 0);  // finite, that is
  }
  const A *weight = rule.weight ? rule.weight + first : nullptr, *bias = rule.bias ? rule.bias + first : nullptr;
  const auto gamma = [&](int64_t c) RENORM_LAMBDA { return weight ? double(weight[c]) : 1; };
  const auto beta = [&](int64_t c) RENORM_LAMBDA { return bias ? double(bias[c]) : 0; };
  const int64_t at = g * problem.shape.channels + first;
  const Coefficients<A>& to = problem.coefficients;
  for_channels(to.center + at, groups, k, [&](int64_t, int64_t j) RENORM_LAMBDA { return by.mean[j]; });
  for_channels(to.scale + at, groups, k, [&](int64_t c, int64_t j) RENORM_LAMBDA { return gamma(c) * scale[j]; });
  for_channels(to.offset + at, groups, k, [&](int64_t c, int64_t j) RENORM_LAMBDA { return gamma(c) * offset[j] + beta(c); });
  for_channels(to.r + at, groups, k, [&](int64_t, int64_t j) RENORM_LAMBDA { return by.r[j]; });
  for_channels(to.d + at, groups, k, [&](int64_t, int64_t j) RENORM_LAMBDA { return by.d[j]; });
  for_channels(to.inverse_sigma + at, groups, k, [&](int64_t, int64_t j) RENORM_LAMBDA { return inverse_sigma[j]; });
  if (!problem.mean) return;
  for_channels(problem.mean + at, channels, 1, [&](int64_t c, int64_t) RENORM_LAMBDA { return batch->mean[c]; });
  for_channels(problem.var + at, channels, 1, [&](int64_t c, int64_t) RENORM_LAMBDA { return each_var[c]; });
  if (first == 0) problem.count[g] = A(batch->count);
}

// Writes the slopes, and `channels` entries of dweight and dbias.
template <class T>
void settle(const Backward<T>& problem, int64_t g, int64_t first, int64_t channels, const Sums& sums,
            const Slopes<Accumulation<T>>& slopes, double* dweight, double* dbias) {
  using A = Accumulation<T>;
  const int64_t k = problem.shape.channels_per_group, groups = channels / k, at = g * problem.shape.channels + first;
  const Coefficients<A>& by = problem.coefficients;
  const A* weight = problem.weight ? problem.weight + first : nullptr;
  const auto gamma = [&](int64_t c) RENORM_LAMBDA { return weight ? double(weight[c]) : 1; };
  const double count = double(problem.count[g]) * k, share = 1 / (count > 1 ? count : 1);
  Buffer<double> numbers(6 * groups);
  double *low = numbers.data, *mean_g = low + groups, *mean_gz = mean_g + groups;
  double *scale = mean_gz + groups, *slope = scale + groups, *constant = slope + groups;
  // The group's mean less center; then the sum of g * (x - mean) from that of g * (x - center).
  sum_channels(low, groups, k, [&](int64_t c, int64_t) RENORM_LAMBDA { return sums.centered[c] * share; });
  for (int64_t j = 0; j < groups; ++j)
    for (int64_t c = j * k; c < (j + 1) * k; ++c) sums.product[c] -= low[j] * sums.gradient[c];
  sum_channels(mean_g, groups, k, [&](int64_t c, int64_t) RENORM_LAMBDA { return gamma(c) * sums.gradient[c] * share; });
  sum_channels(mean_gz, groups, k, [&](int64_t c, int64_t) RENORM_LAMBDA { return gamma(c) * sums.product[c] * share; });
  for (int64_t j = 0; j < groups; ++j) {
    // Through a single element no gradient flows, not even rounding.
    const double inverse_sigma = by.inverse_sigma[at + j * k];
    scale[j] = count > 1 ? inverse_sigma * by.r[at + j * k] : 0;
    slope[j] = -scale[j] * inverse_sigma * inverse_sigma * mean_gz[j];
    constant[j] = -scale[j] * mean_g[j] - slope[j] * low[j];
  }
  const A *inverse_sigma = by.inverse_sigma + at, *r = by.r + at, *d = by.d + at;
  for_channels(dweight, channels, 1, [&](int64_t c, int64_t) RENORM_LAMBDA {
    return sums.product[c] * inverse_sigma[c] * r[c] + sums.gradient[c] * d[c];
  });
  for_channels(dbias, channels, 1, [&](int64_t c, int64_t) RENORM_LAMBDA { return sums.gradient[c]; });
  for_channels(slopes.gradient, groups, k, [&](int64_t c, int64_t j) RENORM_LAMBDA { return gamma(c) * scale[j]; });
  for_channels(slopes.centered, groups, k, [&](int64_t, int64_t j) RENORM_LAMBDA { return slope[j]; });
  for_channels(slopes.constant, groups, k, [&](int64_t, int64_t j) RENORM_LAMBDA { return constant[j]; });
}

}  // namespace RENORM_ISA
}  // namespace renorm
