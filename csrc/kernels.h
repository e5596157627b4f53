// The entry points of one instruction set. Included by kernels_*.cpp once the compiler is told which; forward and backward
// are compiled apart, so that several processors share the work.

#define RENORM_LAMBDA __attribute__((always_inline))

#include "vector.h"

#include "activation.h"
#include "pass.h"

#include "settle.h"

#include "planar.h"

#include "columnar.h"

namespace renorm {
namespace RENORM_ISA {

constexpr int64_t kVector = 16;  // floats of the widest

// Planes of less than a vector are taken several channels at once; so are short ones of many examples, where sums of
// columns cost less than sums of planes.
inline bool has_short_planes(const Shape& shape, bool masked) {
  constexpr int64_t kShort = 64, kFewExamples = 4, kManyExamples = 64;
  const int64_t examples = shape.group_end(0);
  if (masked || shape.positions >= kShort) return false;
  return examples >= (shape.positions < kVector ? kFewExamples : kManyExamples);
}

template <class T, class ACT, bool MASKED>
void run(const Forward<T>& problem) {
  const Shape& shape = problem.shape;
  if (shape.channels_last) {
    for_units(problem.parallel, shape.groups(), shape.elements(), [&](int64_t g, const Parallel& parallel) {
      forward_region<T, ACT, MASKED>(problem, parallel, g, rows_of_positions(shape, g, MASKED));
    });
    return;
  }
  if (problem.rule.source == Source::running && shape.positions >= kVector)
    return forward_planes<T, ACT, MASKED>(problem);
  if (has_short_planes(shape, MASKED)) {
    const int64_t count = panels(shape);
    for_units(problem.parallel, shape.groups() * count, shape.elements(), [&](int64_t unit, const Parallel& parallel) {
      forward_region<T, ACT, false>(problem, parallel, unit / count, rows_of_examples(shape, unit / count, unit % count));
    });
    return;
  }
  const int64_t count = panels(shape);
  for_units(problem.parallel, shape.groups() * count, shape.elements(), [&](int64_t unit, const Parallel& parallel) {
    forward_planar_unit<T, ACT, MASKED>(problem, parallel, unit / count, unit % count);
  });
}

template <class T, class ACT, bool MASKED>
void run(const Backward<T>& problem) {
  const Shape& shape = problem.shape;
  const int64_t groups = shape.groups(), channels = shape.channels;
  Buffer<double> gradients(2 * groups * channels);  // of weight and bias, for every group
  const auto dweight = [&](int64_t g) { return gradients.data + g * channels; };
  const auto dbias = [&](int64_t g) { return gradients.data + (groups + g) * channels; };
  if (shape.channels_last) {
    for_units(problem.parallel, groups, shape.elements(), [&](int64_t g, const Parallel& parallel) {
      backward_region<T, ACT, MASKED>(problem, parallel, g, rows_of_positions(shape, g, MASKED), dweight(g), dbias(g));
    });
  } else if (has_short_planes(shape, MASKED)) {
    const int64_t count = panels(shape);
    for_units(problem.parallel, groups * count, shape.elements(), [&](int64_t unit, const Parallel& parallel) {
      const int64_t g = unit / count;
      backward_region<T, ACT, false>(problem, parallel, g, rows_of_examples(shape, g, unit % count), dweight(g), dbias(g));
    });
  } else {
    const int64_t count = panels(shape);
    for_units(problem.parallel, groups * count, shape.elements(), [&](int64_t unit, const Parallel& parallel) {
      const int64_t g = unit / count;
      backward_planar_unit<T, ACT, MASKED>(problem, parallel, g, unit % count, dweight(g), dbias(g));
    });
  }
  for (int64_t g = 1; g < groups; ++g)
    for (int64_t c = 0; c < channels; ++c) dweight(0)[c] += dweight(g)[c], dbias(0)[c] += dbias(g)[c];
  for (int64_t c = 0; c < channels; ++c) problem.dweight[c] = dweight(0)[c], problem.dbias[c] = dbias(0)[c];
}

template <class P, class ACT>
void with_act(const P& problem) {
  return problem.mask ? run<typename P::Element, ACT, true>(problem) : run<typename P::Element, ACT, false>(problem);
}

template <class P>
void run(const P& problem) {
  if (problem.act == Act::none) return with_act<P, Fixed<Act::none>>(problem);
  if (problem.act == Act::relu) return with_act<P, Fixed<Act::relu>>(problem);
  return with_act<P, Other>(problem);
}

#ifndef RENORM_PROBLEM
#define RENORM_PROBLEM Forward
#endif
#define RENORM_INSTANTIATE(T) template void run(const RENORM_PROBLEM<T>&);
RENORM_FOR_ELEMENTS(RENORM_INSTANTIATE)

}  // namespace RENORM_ISA
}  // namespace renorm
