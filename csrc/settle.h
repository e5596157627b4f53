// From the sums over a group to the coefficients of the pass over its data. One call per group; no vector code.
#pragma once

#include "moments.h"
#include "problem.h"

namespace renorm {

// Writes the moments and coefficients of channel group `j` in example group `g` from those of its channels.
template <class T>
void settle(const Forward<T>& problem, int64_t g, int64_t j, const Moments* channels);

// Sums over a channel in a group, with g the gradient of the normalized output: of g, of x - center, of their product.
struct Sums {
  double gradient = 0, centered = 0, product = 0;
};

// dx = g * gradient + (x - center) * centered + constant
template <class A>
struct Slopes {
  A gradient, centered, constant;
};

// Writes one entry of slopes, dweight and dbias for every channel of the group.
template <class T>
void settle(const Backward<T>& problem, int64_t g, int64_t j, const Sums* sums, Slopes<Accumulation<T>>* slopes,
            double* dweight, double* dbias);

}  // namespace renorm
