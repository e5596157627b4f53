// What both layouts share: the two passes over a run of elements, and how work is divided.

namespace renorm {
namespace RENORM_ISA {

// Coefficients of a run: the same for all its elements, or one per element.
template <class A>
struct Same {
  Vector<A> value;
  explicit Same(A number) : value(broadcast(number)) {}
  template <class L> RENORM_INLINE Vector<A> at(int64_t, const L&) const { return value; }
};
template <class A>
struct Each {
  const A* values;
  template <class L> RENORM_INLINE Vector<A> at(int64_t i, const L& lanes) const { return lanes.load(values + i); }
  Each from(int64_t i) const { return {values + i}; }
};

template <class A>
struct AffineAt {
  Vector<A> center, scale, offset;
};
template <class A, template <class> class C>
struct Affine {
  C<A> center, scale, offset;
  template <class L> RENORM_INLINE AffineAt<A> at(int64_t i, const L& lanes) const {
    return {center.at(i, lanes), scale.at(i, lanes), offset.at(i, lanes)};
  }
  Affine from(int64_t i) const { return {center.from(i), scale.from(i), offset.from(i)}; }
};

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % RENORM_VECTOR_BYTES == 0; }

// What is read next is fetched, since only runs in order, and within a page, are foreseen by the hardware.
template <class T>
RENORM_INLINE void fetch(const T* from) { __builtin_prefetch(from); }

constexpr int64_t kLongRun = 1024;  // elements side by side, of which the first and the last cost little

// Units of whole channel groups, wide enough to be read in long runs, and to be worth what a unit costs by itself.
inline int64_t channels_per_panel(const Shape& shape) {
  constexpr int64_t kWorthwhile = 4096;  // elements; of float, x and dy stay in the first-level cache
  const int64_t k = shape.channels_per_group, worthwhile = kWorthwhile / shape.group_end(0);
  const int64_t fitting = (worthwhile > kLongRun ? worthwhile : kLongRun) / shape.positions / k * k;
  return fitting < k ? k : fitting;
}
inline int64_t panels(const Shape& shape) {
  const int64_t width = channels_per_panel(shape);
  return (shape.channels + width - 1) / width;
}

// Whether a run of outputs is written past the cache: only whole lines, as parts of one would wait for each other.
template <class T>
RENORM_INLINE bool passes_cache(bool wanted, const T* to, int64_t at, int64_t length) {
  constexpr int64_t kLine = kLanes<Accumulation<T>>;
  return wanted && is_aligned(to) && (at | length) % kLine == 0;
}

// y = act((x - center) * scale + offset + residual), 0 where the mask is false; and fetches what lies `ahead`
template <class T, class ACT, bool MASKED, template <class> class C>
RENORM_INLINE void apply_run(const Forward<T>& problem, int64_t at, int64_t mask_at, int64_t length,
                             const Affine<Accumulation<T>, C> affine, int64_t ahead = 0) {
  using A = Accumulation<T>;
  const ACT act(problem.act);
  const uint8_t* mask = MASKED ? problem.mask + mask_at : nullptr;
  const T *x = problem.x + at, *residual = problem.residual ? problem.residual + at : nullptr;
  T* y = problem.y + at;
  const bool past_cache = passes_cache(problem.past_cache, problem.y, at, length);
  for_run<A>(length, before_aligned<A>(at, length), [&](int64_t i, auto lanes) RENORM_LAMBDA {
    const AffineAt<A> by = affine.at(i, lanes);
    Vector<A> z = (lanes.load(x + i) - by.center) * by.scale;
    z += by.offset;
    if (residual) z += lanes.load(residual + i);
    z = act.template forward<A>(z);
    if constexpr (MASKED) z = lanes.load_mask(mask + i) ? z : Vector<A>{};
    lanes.store(y + i, z, past_cache);
    if (ahead) {
      fetch(x + ahead + i);
      if (residual) fetch(residual + ahead + i);
    }
  });
}

// The gradient before the activation, and x - center, of one vector.
template <class A>
struct Pair {
  Vector<A> gradient, centered;
};

// What the backward reads. A copy on the stack: through the problem the compiler would fetch the pointers again after
// every store.
template <class T, class ACT, bool MASKED>
struct Streams {
  using A = Accumulation<T>;
  const T *dy, *x, *y, *residual;
  const uint8_t* mask;
  ACT act;

  RENORM_INLINE Streams(const Backward<T>& problem, int64_t at, int64_t mask_at)
      : dy(problem.dy + at), x(problem.x + at), y(problem.y ? problem.y + at : nullptr),
        residual(problem.residual ? problem.residual + at : nullptr),
        mask(MASKED ? problem.mask + mask_at : nullptr), act(problem.act) {}

  template <class L>
  RENORM_INLINE Pair<A> pair_at(int64_t i, const L& lanes, const AffineAt<A>& by) const {
    Vector<A> g = lanes.load(dy + i), centered = lanes.load(x + i) - by.center;
    if constexpr (!ACT::is_none) {
      loaded(g);
      Vector<A> z;
      if (y) {
        z = lanes.load(y + i);
      } else {
        z = centered * by.scale;
        z += by.offset;
        if (residual) z += lanes.load(residual + i);
      }
      g = act.template backward<A>(g, z);
    }
    if constexpr (MASKED) {
      const Mask<A> counted = lanes.load_mask(mask + i);
      g = counted ? g : Vector<A>{};
      centered = counted ? centered : Vector<A>{};
    }
    return {g, centered};
  }
};

template <class A, template <class> class C>
struct SlopesOf {
  C<A> gradient, centered, constant;
  SlopesOf from(int64_t i) const { return {gradient.from(i), centered.from(i), constant.from(i)}; }
};

// dx = g * slopes.gradient + (x - center) * slopes.centered + slopes.constant, and dresidual = g
template <class T, class ACT, bool MASKED, template <class> class C>
RENORM_INLINE void differentiate_run(const Backward<T>& problem, int64_t at, int64_t mask_at, int64_t length,
                                     const Affine<Accumulation<T>, C> affine,
                                     const SlopesOf<Accumulation<T>, C> slopes, int64_t ahead = 0) {
  using A = Accumulation<T>;
  const Streams<T, ACT, MASKED> streams(problem, at, mask_at);
  T *dx = problem.dx + at, *dresidual = problem.dresidual ? problem.dresidual + at : nullptr;
  const bool past_cache = passes_cache(problem.past_cache, problem.dx, at, length) &&
                          (!dresidual || is_aligned(problem.dresidual));
  for_run<A>(length, before_aligned<A>(at, length), [&](int64_t i, auto lanes) RENORM_LAMBDA {
    const Pair<A> pair = streams.pair_at(i, lanes, affine.at(i, lanes));
    Vector<A> value = pair.centered * slopes.centered.at(i, lanes) + slopes.constant.at(i, lanes);
    value += pair.gradient * slopes.gradient.at(i, lanes);
    if constexpr (MASKED) value = lanes.load_mask(streams.mask + i) ? value : Vector<A>{};
    lanes.store(dx + i, value, past_cache);
    if (dresidual) lanes.store(dresidual + i, pair.gradient, past_cache);
    if (ahead) {
      fetch(streams.x + ahead + i);
      fetch(streams.dy + ahead + i);
      if constexpr (!ACT::is_none)
        if (streams.y) fetch(streams.y + ahead + i);
    }
  });
}

constexpr int64_t kGrain = 32768;  // elements; less is not worth another thread (at::internal::GRAIN_SIZE)

// Units in parallel, each by one thread, so that a unit stays in its cache; or, where there are too few, one after
// another by all threads. What a unit computes does not depend on which: body(unit, parallel).
template <class F>
void for_units(const Parallel& parallel, int64_t units, int64_t elements, F&& body) {
  const int64_t size = elements / units + 1;
  if (units < parallel.threads && size > 2 * kGrain) {
    for (int64_t unit = 0; unit < units; ++unit) body(unit, parallel);
    return;
  }
  auto several = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) body(unit, Parallel{nullptr, 1});
  };
  parallel_for(parallel, units, (kGrain + size - 1) / size, several);
}

// The pieces of a unit, each by one thread.
template <class F>
void for_pieces(const Parallel& parallel, int64_t pieces, int64_t elements, F&& body) {
  auto several = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  };
  parallel_for(parallel, pieces, (kGrain * pieces + elements - 1) / elements, several);
}

}  // namespace RENORM_ISA
}  // namespace renorm
