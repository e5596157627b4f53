// Activations and their derivatives, a vector at a time.

namespace renorm {
namespace RENORM_ISA {

// exp to one unit in the last place or two: 2^n * exp(r), |r| <= ln(2) / 2, exp(r) by its Taylor polynomial.
RENORM_INLINE Vector<float> exponential(Vector<float> x) {
  x = x > 88.7f ? broadcast(88.7f) : x;
  x = x < -87.3f ? broadcast(-87.3f) : x;
  const Mask<float> n = __builtin_convertvector(x * 1.44269504f + (x < 0 ? broadcast(-0.5f) : broadcast(0.5f)), Mask<float>);
  const Vector<float> whole = __builtin_convertvector(n, Vector<float>);
  const Vector<float> r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector<float> y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r * r + r + 1;
  return y * (Vector<float>)((n + 127) << 23);
}
RENORM_INLINE Vector<double> exponential(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// Abramowitz & Stegun 7.1.26, error 1.5e-7 at most
RENORM_INLINE Vector<float> error_function(Vector<float> x) {
  const Vector<float> size = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * size);
  Vector<float> tail = t * 1.061405429f - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = (tail * t + 0.254829592f) * t;
  const Vector<float> y = 1 - tail * exponential(-size * size);
  return x < 0 ? -y : y;
}
RENORM_INLINE Vector<double> error_function(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}

template <class A>
RENORM_INLINE Vector<A> sigmoid(Vector<A> z) { return 1 / (1 + exponential(-z)); }

constexpr double kLeakySlope = 0.01, kHalfSqrt = 0.70710678118654752440, kInverseSqrtTwoPi = 0.39894228040143267794;

// NaN comes out as NaN, as from torch's functions: comparisons with it are false.
template <class A>
RENORM_INLINE Vector<A> activate(Act act, Vector<A> z) {
  switch (act) {
    case Act::none: return z;
    case Act::relu: return z <= 0 ? Vector<A>{} : z;
    case Act::relu6: return z <= 0 ? Vector<A>{} : z > 6 ? broadcast(A(6)) : z;
    case Act::leaky_relu: return z <= 0 ? z * A(kLeakySlope) : z;
    case Act::silu: return z * sigmoid<A>(z);
    case Act::gelu: return z * A(0.5) * (1 + error_function(z * A(kHalfSqrt)));
    case Act::hardswish: return z <= -3 ? Vector<A>{} : z >= 3 ? z : z * (z + 3) * A(1.0 / 6);
  }
  __builtin_unreachable();
}

// The gradient before the activation, from that after it; z is what went in. What came out gives the same for the
// piecewise linear ones.
template <class A>
RENORM_INLINE Vector<A> backpropagate(Act act, Vector<A> dy, Vector<A> z) {
  const Vector<A> zero{};
  switch (act) {
    case Act::none: return dy;
    case Act::relu: return z <= 0 ? zero : dy;
    case Act::relu6: return z <= 0 ? zero : z >= 6 ? zero : dy;
    case Act::leaky_relu: return z <= 0 ? dy * A(kLeakySlope) : dy;
    case Act::silu: {
      const Vector<A> s = sigmoid<A>(z);
      return dy * s * (1 + z * (1 - s));
    }
    case Act::gelu: {
      const Vector<A> cumulative = A(0.5) * (1 + error_function(z * A(kHalfSqrt)));
      return dy * (cumulative + z * A(kInverseSqrtTwoPi) * exponential(z * z * A(-0.5)));
    }
    case Act::hardswish: return z <= -3 ? zero : z >= 3 ? dy : dy * (z * A(1.0 / 3) + A(0.5));
  }
  __builtin_unreachable();
}

// Long code that loops call, so that it is there once.
template <class A>
__attribute__((noinline)) Vector<A> activate_apart(Act act, Vector<A> z) { return activate<A>(act, z); }
template <class A>
__attribute__((noinline)) Vector<A> backpropagate_apart(Act act, Vector<A> dy, Vector<A> z) {
  return backpropagate<A>(act, dy, z);
}

// The activations that loops are compiled for.
template <Act ACT> struct Fixed {
  static constexpr bool is_none = ACT == Act::none;
  explicit Fixed(Act) {}
  template <class A> RENORM_INLINE Vector<A> forward(Vector<A> z) const { return activate<A>(ACT, z); }
  template <class A> RENORM_INLINE Vector<A> backward(Vector<A> dy, Vector<A> z) const {
    return backpropagate<A>(ACT, dy, z);
  }
};
// Any, for which a loop asks at every vector.
struct Any {
  static constexpr bool is_none = false;
  Act act;
  explicit Any(Act value) : act(value) {}
  template <class A> RENORM_INLINE Vector<A> forward(Vector<A> z) const {
    if (act == Act::none) return z;
    return act == Act::relu ? activate<A>(Act::relu, z) : activate_apart<A>(act, z);
  }
  template <class A> RENORM_INLINE Vector<A> backward(Vector<A> dy, Vector<A> z) const {
    if (act == Act::none) return dy;
    return act == Act::relu ? backpropagate<A>(Act::relu, dy, z) : backpropagate_apart<A>(act, dy, z);
  }
};

}  // namespace RENORM_ISA
}  // namespace renorm
