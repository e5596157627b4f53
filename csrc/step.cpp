// A layer's step of eager code, past torch's dispatcher, which costs more than a small layer's kernels: plain C functions
// on addresses, called by ops/native.py.
#include <new>

#include "dispatch.h"
#include "entry.h"
#include "tracking.h"

#define RENORM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum class Element { float32, float64, bfloat16, float16 };
constexpr const char* kElementNames[] = {"float32", "float64", "bfloat16", "float16"};

// All of a step that is not an address: made once for tensors of a kind.
struct Step {
  Element element;
  renorm::Shape shape;
  renorm::Act act;
  renorm::Tracking tracking;
  double momentum, eps;
  bool past_cache;
};

template <class F>
void with_element(Element element, F&& body) {
  switch (element) {
    case Element::float32: return body(float{});
    case Element::float64: return body(double{});
    case Element::bfloat16: return body(renorm::BFloat16{});
    case Element::float16: return body(renorm::Float16{});
  }
}

// As ops/native.py packs them, which costs less than arguments one by one do; null where there is nothing.
template <class T, class A>
struct ForwardArguments {
  const T* x;
  const A *weight, *bias;
  const uint8_t* mask;
  const T* residual;
  A *running_mean, *running_var;
  int64_t *steps, *skipped;
  double r_max, d_max;  // an r_max of 0 stands for no correction
  T* y;
  void* kept;
};

template <class T, class A>
struct BackwardArguments {
  const T *dy, *x;
  const A* weight;
  const uint8_t* mask;
  const T *residual, *y;
  void* kept;
  T *dx, *dresidual;
  A *dweight, *dbias;
};

// What a forward leaves for the backward, one after the other: mean and variance, (G, C), count, (G,), coefficients.
template <class A>
struct Kept {
  A *mean, *var, *count;
  renorm::Coefficients<A> coefficients;

  Kept(void* memory, int64_t groups, int64_t channels)
      : mean(static_cast<A*>(memory)), var(mean + groups * channels), count(var + groups * channels),
        coefficients(count + groups, groups * channels) {}
};

// torch's tensors of zeros have none.
void require_memory(bool is_there) {
  if (!is_there) throw std::bad_alloc();
}

// No exception crosses into C.
template <class F>
bool succeeds(F&& body) {
  try {
    body();
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace

// Null where a name is unknown, or memory is out.
RENORM_EXPORT Step* renorm_make_step(const char* element, int64_t examples, int64_t channels, int64_t positions,
                                     bool channels_last, int64_t examples_per_group, int64_t channels_per_group,
                                     const char* act, const char* tracking, double momentum, double eps) {
  Step* step = nullptr;
  succeeds([&] {
    const auto type = renorm::named<Element>("dtype", kElementNames, element);
    const int64_t bytes = type == Element::float64 ? 8 : type == Element::float32 ? 4 : 2;
    const bool past_cache = examples * channels * positions * bytes > renorm::kPastCacheBytes;
    step = new Step{type,
                    {examples, channels, positions, channels_last, examples_per_group, channels_per_group},
                    renorm::named<renorm::Act>("act", renorm::kActNames, act),
                    renorm::named<renorm::Tracking>("tracking", renorm::kTrackingNames, tracking),
                    momentum, eps, past_cache};
  });
  return step;
}

RENORM_EXPORT void renorm_drop_step(Step* step) { delete step; }

RENORM_EXPORT bool renorm_step_forward(const Step* step, const void* arguments) {
  return succeeds([&] {
    with_element(step->element, [&](auto element) {
      using T = decltype(element);
      using A = renorm::Accumulation<T>;
      const auto& at = *static_cast<const ForwardArguments<T, A>*>(arguments);
      require_memory(at.x && at.y);
      const renorm::Shape& shape = step->shape;
      const int64_t groups = shape.groups();
      const Kept<A> kept(at.kept, groups, shape.channels);
      renorm::run(renorm::Forward<T>{
          renorm::torch_threads(), shape, step->act, step->past_cache,
          {at.r_max > 0 ? renorm::Source::renorm : renorm::Source::batch, at.weight, at.bias, at.running_mean,
           at.running_var, nullptr, nullptr, at.r_max, at.d_max, 0, step->eps},
          at.x, at.residual, at.mask, at.y, kept.mean, kept.var, kept.count, kept.coefficients});
      renorm::track<A>({at.running_mean, at.running_var, at.steps, at.skipped},
                       {kept.mean, kept.var, kept.count, groups, shape.channels}, step->tracking, step->momentum,
                       shape.channels_per_group, step->eps);
    });
  });
}

RENORM_EXPORT bool renorm_step_backward(const Step* step, const void* arguments) {
  return succeeds([&] {
    with_element(step->element, [&](auto element) {
      using T = decltype(element);
      using A = renorm::Accumulation<T>;
      const auto& at = *static_cast<const BackwardArguments<T, A>*>(arguments);
      require_memory(at.dy && at.x && at.dx);
      const renorm::Shape& shape = step->shape;
      const Kept<A> kept(at.kept, shape.groups(), shape.channels);
      renorm::run(renorm::Backward<T>{renorm::torch_threads(), shape, step->act, step->past_cache, at.weight,
                                      kept.count, at.dy, at.x, at.residual, at.y, at.mask, at.dx, at.dresidual,
                                      at.dweight, at.dbias, kept.coefficients});
    });
  });
}
