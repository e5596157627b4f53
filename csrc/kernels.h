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
// columns cost less than sums of planes: up to two vectors, of as many as they have positions.
inline bool has_short_planes(const Shape& shape, bool masked) {
  constexpr int64_t kShort = 64, kFewExamples = 4, kManyExamples = 64;
  const int64_t examples = shape.group_end(0);
  if (masked || shape.positions >= kShort) return false;
  if (shape.positions < kVector) return examples >= kFewExamples;
  return examples >= (shape.positions <= 2 * kVector ? shape.positions : kManyExamples);
}

// How a problem is divided: into units of some channels in an example group, whose sums are of columns or of planes.
struct Division {
  const Shape& shape;
  bool masked, is_columnar;
  int64_t panels_per_group;

  Division(const Shape& shape, bool masked)
      : shape(shape), masked(masked), is_columnar(shape.channels_last || has_short_planes(shape, masked)),
        panels_per_group(shape.channels_last ? 1 : panels(shape)) {}
  int64_t units() const { return shape.groups() * panels_per_group; }
  int64_t group(int64_t unit) const { return unit / panels_per_group; }
  int64_t panel(int64_t unit) const { return unit % panels_per_group; }
  Region region(int64_t unit) const {
    return shape.channels_last ? rows_of_positions(shape, unit, masked) : rows_of_examples(shape, group(unit), panel(unit));
  }
};

// Loops over planes under a mask are compiled for all activations at once.
template <class T, class ACT>
void run(const Forward<T>& problem) {
  const Division division(problem.shape, problem.mask);
  if (!division.is_columnar && problem.rule.source == Source::running && problem.shape.positions >= kVector)
    return problem.mask ? forward_planes<T, Any, true>(problem) : forward_planes<T, ACT, false>(problem);
  for_units(problem.parallel, division.units(), problem.shape.elements(), [&](int64_t unit, const Parallel& parallel) {
    const int64_t g = division.group(unit), panel = division.panel(unit);
    if (division.is_columnar) forward_region<T, ACT>(problem, parallel, g, division.region(unit));
    else if (problem.mask) forward_planar_unit<T, Any, true>(problem, parallel, g, panel);
    else forward_planar_unit<T, ACT, false>(problem, parallel, g, panel);
  });
}

template <class T, class ACT>
void run(const Backward<T>& problem) {
  const Division division(problem.shape, problem.mask);
  const int64_t groups = problem.shape.groups(), channels = problem.shape.channels;
  Buffer<double> gradients(2 * groups * channels);  // of weight and bias, for every group
  const auto dweight = [&](int64_t g) { return gradients.data + g * channels; };
  const auto dbias = [&](int64_t g) { return gradients.data + (groups + g) * channels; };
  for_units(problem.parallel, division.units(), problem.shape.elements(), [&](int64_t unit, const Parallel& parallel) {
    const int64_t g = division.group(unit), panel = division.panel(unit);
    if (division.is_columnar)
      backward_region<T, ACT>(problem, parallel, g, division.region(unit), dweight(g), dbias(g));
    else if (problem.mask) backward_planar_unit<T, Any, true>(problem, parallel, g, panel, dweight(g), dbias(g));
    else backward_planar_unit<T, ACT, false>(problem, parallel, g, panel, dweight(g), dbias(g));
  });
  for (int64_t g = 1; g < groups; ++g)
    for (int64_t c = 0; c < channels; ++c) dweight(0)[c] += dweight(g)[c], dbias(0)[c] += dbias(g)[c];
  for (int64_t c = 0; c < channels; ++c) problem.dweight[c] = dweight(0)[c], problem.dbias[c] = dbias(0)[c];
}

template <class P>
void run(const P& problem) {
  using T = typename P::Element;
  if (problem.act == Act::none) return run<T, Fixed<Act::none>>(problem);
  if (problem.act == Act::relu) return run<T, Fixed<Act::relu>>(problem);
  return run<T, Any>(problem);
}

#ifndef RENORM_PROBLEM
#define RENORM_PROBLEM Forward
#endif
#define RENORM_INSTANTIATE(T) template void run(const RENORM_PROBLEM<T>&);
RENORM_FOR_ELEMENTS(RENORM_INSTANTIATE)

}  // namespace RENORM_ISA
}  // namespace renorm
