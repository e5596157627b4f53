// Mean and sum of squared deviations of sets of numbers, and how they merge. Each loop is one that the compiler makes
// vectors of.
#pragma once

#include <cstdint>

namespace renorm {

// Mean and sum of squared deviations of some channels, of `count` elements each.
struct Moments {
  double *mean, *m2, count;

  // Chan, Golub & LeVeque 1979
  void merge(const Moments& other, int64_t channels) {
    if (other.count == 0) return;
    const double share = other.count / (count + other.count), weight = count * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = other.mean[c] - mean[c];
      mean[c] += delta * share;
      m2[c] += other.m2[c] + delta * delta * weight;
    }
    count += other.count;
  }
  // 0 without an element; rounding may leave m2 just below 0, and NaN stays NaN.
  void write_var(double* __restrict to, int64_t channels) const {
    const double each = count > 0 ? 1 / count : 0, *from = m2;
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c] < 0 ? 0 : from[c] * each;
  }
};

// Whether sums of x - shift and of its square lost digits, the mean being `drift` away: seen from the deviations, or,
// where these are nothing but rounding, from the shift.
template <class A>
bool strays(A drift, A var, A shift) {
  constexpr A kRounding = A(1e-12);  // relative, squared
  return drift * drift > 4 * var + kRounding * shift * shift;
}

}  // namespace renorm
