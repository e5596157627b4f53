// The kernels against loops as naive as they can be written, without torch: run under the sanitizers by
// `make sanitize`. Threads are real ones, so that the thread sanitizer sees what torch's would do.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../dispatch.h"
#include "../tracking.h"

namespace {

using renorm::Accumulation;
using renorm::Act;
using renorm::Shape;
using renorm::Source;

// Ranges of a few units each, on a thread of their own.
template <int THREADS>
renorm::Parallel threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, renorm::Parallel::Task task, void* context) {
            const int64_t most = (end - begin + grain - 1) / grain, count = most < THREADS ? most : THREADS;
            const int64_t size = (end - begin + count - 1) / count;
            std::vector<std::thread> workers;
            for (int64_t from = begin; from < end; from += size)
              workers.emplace_back(task, from, from + size < end ? from + size : end, context);
            for (std::thread& worker : workers) worker.join();
          },
          THREADS};
}

template <class T>
struct Case {
  using A = Accumulation<T>;
  Shape shape;
  Act act;
  Source source;
  std::vector<T> x, dy, residual;
  std::vector<A> weight, bias, mean, var;
  std::vector<uint8_t> mask;

  int64_t at(int64_t n, int64_t c, int64_t s) const {
    return shape.channels_last ? (n * shape.positions + s) * shape.channels + c
                               : (n * shape.channels + c) * shape.positions + s;
  }
  bool counts(int64_t n, int64_t s) const { return mask.empty() || mask[n * shape.positions + s]; }
};

// Vectors of exactly the size the kernels may touch, so that the address sanitizer sees every step beyond.
template <class T>
struct Result {
  using A = Accumulation<T>;
  std::vector<T> y, dx, dresidual;
  std::vector<A> mean, var, count, coefficients, dweight, dbias;
};

template <class T>
const T* or_null(const std::vector<T>& values) { return values.empty() ? nullptr : values.data(); }

// As ops/kernels.py: with a residual, the gradient of a piecewise linear activation is computed from y, others from both.
template <class T>
bool keeps_output(const Case<T>& c) {
  return !c.residual.empty() && (c.act == Act::relu || c.act == Act::relu6 || c.act == Act::leaky_relu);
}

template <class T>
Result<T> run(const Case<T>& c, const renorm::Parallel& parallel, bool past_cache) {
  using A = Accumulation<T>;
  const int64_t groups = c.shape.groups(), channels = c.shape.channels, cells = groups * channels;
  Result<T> r;
  r.y.resize(c.x.size());
  r.dx.resize(c.x.size());
  if (!c.residual.empty()) r.dresidual.resize(c.x.size());
  r.mean.resize(cells);
  r.var.resize(cells);
  r.count.resize(groups);
  r.coefficients.resize(6 * cells);
  r.dweight.resize(channels);
  r.dbias.resize(channels);
  const renorm::Coefficients<A> coefficients(r.coefficients.data(), cells);
  renorm::run(renorm::Forward<T>{parallel, c.shape, c.act, past_cache,
                                 {c.source, or_null(c.weight), or_null(c.bias), c.mean.data(), c.var.data(), nullptr,
                                  nullptr, 1.5, 0.5, 0, 1e-5},
                                 c.x.data(), or_null(c.residual), or_null(c.mask), r.y.data(), r.mean.data(),
                                 r.var.data(), r.count.data(), coefficients});
  renorm::run(renorm::Backward<T>{parallel, c.shape, c.act, past_cache, or_null(c.weight), r.count.data(), c.dy.data(),
                                  c.x.data(), keeps_output(c) ? nullptr : or_null(c.residual),
                                  keeps_output(c) ? r.y.data() : nullptr, or_null(c.mask), r.dx.data(),
                                  r.dresidual.empty() ? nullptr : r.dresidual.data(), r.dweight.data(), r.dbias.data(),
                                  coefficients});
  return r;
}

double activate(Act act, double z) {
  switch (act) {
    case Act::none: return z;
    case Act::relu: return z > 0 ? z : 0;
    case Act::relu6: return z < 0 ? 0 : z > 6 ? 6 : z;
    case Act::leaky_relu: return z > 0 ? z : 0.01 * z;
    case Act::silu: return z / (1 + std::exp(-z));
    case Act::gelu: return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Act::hardswish: return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
  }
  return z;
}

double derivative(Act act, double z) {
  const double step = 1e-6;
  if (act == Act::relu) return z > 0;
  if (act == Act::relu6) return z > 0 && z < 6;
  if (act == Act::leaky_relu) return z > 0 ? 1 : 0.01;
  if (act == Act::hardswish) return z <= -3 ? 0 : z >= 3 ? 1 : z / 3 + 0.5;
  return (activate(act, z + step) - activate(act, z - step)) / (2 * step);
}

// y and all gradients by the formulas of Ioffe 2017, in double.
template <class T>
Result<double> expected(const Case<T>& c) {
  const Shape& s = c.shape;
  Result<double> r;
  r.y.assign(c.x.size(), 0);
  r.dx.assign(c.x.size(), 0);
  if (!c.residual.empty()) r.dresidual.assign(c.x.size(), 0);
  r.dweight.assign(s.channels, 0);
  r.dbias.assign(s.channels, 0);
  const int64_t k = s.channels_per_group;
  for (int64_t g = 0; g < s.groups(); ++g) {
    for (int64_t j = 0; j < s.channel_groups(); ++j) {
      const auto each = [&](auto&& body) {
        for (int64_t n = s.group_begin(g); n < s.group_end(g); ++n)
          for (int64_t ch = j * k; ch < (j + 1) * k; ++ch)
            for (int64_t p = 0; p < s.positions; ++p)
              if (c.counts(n, p)) body(ch, c.at(n, ch, p));
      };
      double m = 0, mean = 0, var = 0, mu = 0, v = 0;
      each([&](int64_t, int64_t i) { m += 1, mean += double(c.x[i]); });
      if (m == 0) continue;
      mean /= m;
      each([&](int64_t, int64_t i) { var += (double(c.x[i]) - mean) * (double(c.x[i]) - mean) / m; });
      for (int64_t ch = j * k; ch < (j + 1) * k; ++ch) mu += double(c.mean[ch]) / k;
      for (int64_t ch = j * k; ch < (j + 1) * k; ++ch) v += (c.var[ch] + (c.mean[ch] - mu) * (c.mean[ch] - mu)) / k;
      const double sigma = std::sqrt(var + 1e-5), target = std::sqrt(v + 1e-5);
      double ratio = 1, d = 0;
      if (c.source == Source::renorm) {
        ratio = std::fmin(std::fmax(sigma / target, 1 / 1.5), 1.5);
        d = std::fmin(std::fmax((mean - mu) / target, -0.5), 0.5);
      }
      double sum_g = 0, sum_gz = 0;
      std::vector<double> gradient(c.x.size());
      each([&](int64_t ch, int64_t i) {
        const double z = (double(c.x[i]) - mean) / sigma, gamma = c.weight.empty() ? 1 : double(c.weight[ch]);
        const double beta = c.bias.empty() ? 0 : double(c.bias[ch]), added = c.residual.empty() ? 0 : double(c.residual[i]);
        const double pre = gamma * (z * ratio + d) + beta + added;
        r.y[i] = activate(c.act, pre);
        gradient[i] = double(c.dy[i]) * derivative(c.act, pre);
        if (!c.residual.empty()) r.dresidual[i] = gradient[i];
        r.dweight[ch] += gradient[i] * (z * ratio + d);
        r.dbias[ch] += gradient[i];
        sum_g += gamma * gradient[i];
        sum_gz += gamma * gradient[i] * z;
      });
      each([&](int64_t ch, int64_t i) {
        const double z = (double(c.x[i]) - mean) / sigma, gamma = c.weight.empty() ? 1 : double(c.weight[ch]);
        r.dx[i] = m == 1 ? 0 : ratio / sigma * (gamma * gradient[i] - sum_g / m - z * sum_gz / m);
      });
    }
  }
  return r;
}

int failures = 0;

template <class A>
void compare(const char* what, const std::vector<A>& actual, const std::vector<double>& wanted, double tolerance,
             const Shape& s) {
  double worst = 0, size = 1;
  for (double value : wanted) size = std::fmax(size, std::fabs(value));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double error = std::fabs(double(actual[i]) - wanted[i]) / size;
    worst = error <= worst ? worst : error;  // NaN becomes the worst
  }
  if (worst <= tolerance) return;
  ++failures;
  std::printf("%s off by %g: (%ld, %ld, %ld)%s, groups of %ld x %ld\n", what, worst, long(s.examples), long(s.channels),
              long(s.positions), s.channels_last ? " channels last" : "", long(s.examples_per_group),
              long(s.channels_per_group));
}

template <class V>
bool same_bits(const V& a, const V& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
}

template <class T>
bool same_bits(const Result<T>& a, const Result<T>& b) {
  return same_bits(a.y, b.y) && same_bits(a.dx, b.dx) && same_bits(a.dresidual, b.dresidual) &&
         same_bits(a.mean, b.mean) && same_bits(a.var, b.var) && same_bits(a.count, b.count) &&
         same_bits(a.coefficients, b.coefficients) && same_bits(a.dweight, b.dweight) && same_bits(a.dbias, b.dbias);
}

template <class T>
void check(const Case<T>& c, double tolerance) {
  const Result<double> wanted = expected(c);
  const Result<T> actual = run(c, threads<1>(), false);
  compare("y", actual.y, wanted.y, tolerance, c.shape);
  compare("dx", actual.dx, wanted.dx, tolerance, c.shape);
  compare("dresidual", actual.dresidual, wanted.dresidual, tolerance, c.shape);
  compare("dweight", actual.dweight, wanted.dweight, tolerance, c.shape);
  compare("dbias", actual.dbias, wanted.dbias, tolerance, c.shape);
  if (!same_bits(actual, run(c, threads<2>(), true)) || !same_bits(actual, run(c, threads<5>(), false))) {
    ++failures;
    std::printf("depends on the number of threads\n");
  }
}

template <class T>
Case<T> draw(std::mt19937& random, bool large) {
  const auto below = [&](int64_t end) { return int64_t(random() % end); };
  const auto numbers = [&](int64_t count, double low, double high) {
    std::uniform_real_distribution<double> distribution(low, high);
    std::vector<T> values(count);
    for (T& value : values) value = T(distribution(random));
    return values;
  };
  Case<T> c;
  const int64_t k = 1 + below(3), channels = k * (1 + below(large ? 40 : 6));
  const int64_t examples = 1 + below(large ? 12 : 9), positions = 1 + below(large ? 5000 / channels : 40);
  const int64_t sizes[] = {examples, 1, 2, 3};
  c.shape = {examples, channels, positions, below(2) == 1, sizes[below(4)], k};
  c.act = Act(below(renorm::kActs));
  c.source = below(2) ? Source::renorm : Source::batch;
  const int64_t size = examples * channels * positions;
  c.x = numbers(size, 3, 6);
  c.dy = numbers(size, -1, 1);
  if (below(2)) c.residual = numbers(size, -2, 2);
  if (below(3)) c.weight = numbers(channels, 0.5, 2);
  if (below(3)) c.bias = numbers(channels, -1, 1);
  c.mean = numbers(channels, 3, 6);
  c.var = numbers(channels, 0.5, 2);
  if (below(3) == 0) {
    c.mask.resize(examples * positions);
    for (uint8_t& counted : c.mask) counted = below(3) > 0;
  }
  return c;
}

void check_tracking() {
  std::vector<float> mean{0, 1}, var{1, 2}, batch_mean{1, 3}, batch_var{2, 2}, count{4};
  int64_t steps = 0, skipped = 0;
  const renorm::Running<float> running{mean.data(), var.data(), &steps, &skipped};
  const renorm::Batch<float> batch{batch_mean.data(), batch_var.data(), count.data(), 1, 2};
  renorm::track(running, batch, renorm::Tracking::total, 0.5, 1, 1e-5);
  if (mean[0] != 0.5f || std::fabs(var[0] - 1.75f) > 1e-6 || steps != 1) ++failures, std::printf("tracking is off\n");
  batch_mean[0] = NAN;
  renorm::track(running, batch, renorm::Tracking::var, 0.5, 1, 1e-5);
  if (steps != 1 || skipped != 1 || mean[0] != 0.5f) ++failures, std::printf("a batch of NaN was not skipped\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 400;
  std::mt19937 random(1);
  for (int i = 0; i < cases; ++i) {
    check(draw<float>(random, i % 8 == 0), 2e-5);
#ifndef RENORM_FLOAT_ONLY
    check(draw<double>(random, i % 8 == 0), 1e-8);  // the derivatives by differences are no better
#endif
  }
  // Large enough for several segments and threads
  for (const bool channels_last : {false, true}) {
    Case<float> c = draw<float>(random, false);
    c.shape = {6, 24, 5000, channels_last, 6, 1};
    c.act = Act::relu;
    c.residual.clear();
    c.mask.clear();
    std::uniform_real_distribution<float> distribution(3, 6);
    c.x.resize(6 * 24 * 5000);
    for (float& value : c.x) value = distribution(random);
    c.dy = c.x;
    c.weight.assign(24, 1.5f);
    c.bias.assign(24, 0.1f);
    c.mean.assign(24, 4.f);
    c.var.assign(24, 1.f);
    check(c, 2e-5);
  }
  check_tracking();
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures != 0;
}
