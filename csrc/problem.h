// What the kernels are asked to do: shapes, pointers and rules, without torch and without vector code.
#pragma once

#include <cstdint>

namespace renorm {

// An activation, and its name at the same place.
enum class Act { none, relu, relu6, leaky_relu, silu, gelu, hardswish };
constexpr const char* kActNames[] = {"none", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish"};
constexpr int kActs = sizeof(kActNames) / sizeof(*kActNames);
static_assert(kActs == int(Act::hardswish) + 1, "every activation has its name");

// torch's parallel_for, or a test's: calls task(begin, end, context) on disjoint ranges that cover [begin, end).
struct Parallel {
  using Task = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t begin, int64_t end, int64_t grain, Task task, void* context);
  int64_t threads;
};

template <class F>
void parallel_for(const Parallel& parallel, int64_t end, int64_t grain, F& body) {
  if (end <= grain || parallel.threads == 1) return body(0, end);
  parallel.run(0, end, grain, [](int64_t from, int64_t to, void* context) { (*static_cast<F*>(context))(from, to); },
               &body);
}

// x is (examples, channels, positions), or (examples, positions, channels) where channels come last.
struct Shape {
  int64_t examples, channels, positions;
  bool channels_last;
  int64_t examples_per_group, channels_per_group;

  // What is left over forms a smaller last group; a single example joins its predecessor.
  int64_t groups() const {
    if (examples_per_group >= examples) return 1;
    const int64_t whole = examples / examples_per_group;
    return examples % examples_per_group > 1 ? whole + 1 : whole;
  }
  int64_t group_begin(int64_t group) const { return group * examples_per_group; }
  int64_t group_end(int64_t group) const {
    return group + 1 == groups() ? examples : (group + 1) * examples_per_group;
  }
  int64_t elements() const { return examples * channels * positions; }
  int64_t channel_groups() const { return channels / channels_per_group; }
};

// Where scale and offset come from.
enum class Source {
  batch,    // the group's moments
  renorm,   // the same, corrected towards the running statistics within limits
  given,    // the same, corrected by r and d as given
  weighed,  // the running statistics, weighed with those of each example (a group)
  running,  // the running statistics alone
};

template <class A>
struct Rule {
  Source source;
  const A *weight, *bias;                  // (C,), or null for 1 and 0
  const A *running_mean, *running_var;     // (C,)
  const A *r, *d;                          // (G, K)
  double r_max, d_max, example_weight, eps;
};

// One number per group and channel, (G, C) each, that the data's pass needs: y = (x - center) * scale + offset.
template <class A>
struct Coefficients {
  A *center, *scale, *offset, *r, *d, *inverse_sigma;

  Coefficients(A* rows, int64_t stride)
      : center(rows), scale(rows + stride), offset(rows + 2 * stride), r(rows + 3 * stride), d(rows + 4 * stride),
        inverse_sigma(rows + 5 * stride) {}
  static constexpr int64_t rows = 6;
};

// Half precision is computed in float.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// X(T) for every type of element that there are kernels for.
#ifdef RENORM_FLOAT_ONLY  // sanitizers take minutes to compile what differs in nothing but the type
#define RENORM_FOR_ELEMENTS(X) X(float)
#else
#define RENORM_FOR_ELEMENTS(X) X(float) X(double) X(BFloat16) X(Float16)
#endif

template <class T> struct AccumulationOf { using type = float; };
template <> struct AccumulationOf<double> { using type = double; };
template <class T> using Accumulation = typename AccumulationOf<T>::type;

template <class T>
struct Forward {
  using Element = T;
  using A = Accumulation<T>;
  Parallel parallel;
  Shape shape;
  Act act;
  bool past_cache;  // whether the output is too large to stay in the cache
  Rule<A> rule;
  const T *x, *residual;  // residual or null
  const uint8_t* mask;    // (examples, positions) or null
  T* y;
  A *mean, *var, *count;  // (G, C), (G, C), (G,); null where the source needs no moments
  Coefficients<A> coefficients;
};

template <class T>
struct Backward {
  using Element = T;
  using A = Accumulation<T>;
  Parallel parallel;
  Shape shape;
  Act act;
  bool past_cache;  // whether the output is too large to stay in the cache
  const A *weight, *count;  // (C,) or null, (G,)
  const T *dy, *x;
  const T *residual, *y;    // what the activation's gradient needs besides x: at most one is not null
  const uint8_t* mask;
  T *dx, *dresidual;        // dresidual or null
  A *dweight, *dbias;       // (C,)
  Coefficients<A> coefficients;
};

}  // namespace renorm
