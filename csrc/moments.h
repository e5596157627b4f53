// Mean and sum of squared deviations of sets of numbers, and how they merge.
#pragma once

namespace renorm {

struct Moments {
  double mean = 0, m2 = 0, count = 0;

  // Chan, Golub & LeVeque 1979
  void merge(double other_mean, double other_m2, double other_count) {
    if (other_count == 0) return;
    const double delta = other_mean - mean, share = other_count / (count + other_count);
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count += other_count;
  }
  // 0 without an element; rounding may leave m2 just below 0, and NaN stays NaN.
  double var() const { return count == 0 || m2 < 0 ? 0 : m2 / count; }
};

// Whether sums of x - shift and of its square lost digits, the mean being `drift` away: seen from the deviations, or,
// where these are nothing but rounding, from the shift.
template <class A>
bool strays(A drift, A var, A shift) {
  constexpr A kRounding = A(1e-12);  // relative, squared
  return drift * drift > 4 * var + kRounding * shift * shift;
}

}  // namespace renorm
