// Where a channel's positions lie side by side: a unit is the planes of a channel group in an example group.

namespace renorm {
namespace RENORM_ISA {

// A channel's elements in a group, cut into chunks whose sums float holds well and whose data the cache holds.
// The cut depends on the shape alone, so the result does not depend on the number of threads.
struct Chunks {
  static constexpr int64_t kElements = 4096;
  const Shape& shape;
  int64_t first, last;                    // examples
  int64_t pieces, length, planes;         // pieces of a plane, elements of each; planes in a chunk
  int64_t per_channel;

  Chunks(const Shape& shape, int64_t group)
      : shape(shape), first(shape.group_begin(group)), last(shape.group_end(group)) {
    const int64_t size = shape.positions;
    pieces = (size + kElements - 1) / kElements;
    length = size < kElements ? size : kElements;
    planes = size < kElements ? kElements / size : 1;
    per_channel = (last - first + planes - 1) / planes * pieces;
  }
  int64_t elements() const { return (last - first) * shape.positions; }

  // body(offset into x, offset into the mask, length) for every run of chunk `index` of a channel
  template <class F>
  RENORM_INLINE void for_runs(int64_t channel, int64_t index, F&& body) const {
    const int64_t start = index % pieces * length, size = shape.positions - start;
    const int64_t begin = first + index / pieces * planes, end = begin + planes < last ? begin + planes : last;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = (n * shape.channels + channel) * shape.positions + start;
      body(at, n * shape.positions + start, size < length ? size : length);
    }
  }
};

// A plane is read from its beginning to its end, and then another one far away, whose beginning no hardware foresees.
template <class T>
RENORM_INLINE void prefetch_plane(const T* from, const Shape& shape) {
  constexpr int64_t kLine = 64 / sizeof(T), kMost = 8;
  const int64_t lines = shape.positions / kLine < kMost ? shape.positions / kLine : kMost;
  for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * kLine);
}

template <class T, bool MASKED>
Moments moments_of_chunk(const Forward<T>& problem, const Chunks& chunks, int64_t channel, int64_t index) {
  using A = Accumulation<T>;
  Vector<A> totals[2][2] = {};
  int64_t count = 0;
  chunks.for_runs(channel, index, [&](int64_t at, [[maybe_unused]] int64_t mask_at, int64_t length) RENORM_LAMBDA {
    count += length;
    const int64_t next = at + problem.shape.channels * problem.shape.positions;
    if (next < problem.shape.elements()) prefetch_plane(problem.x + next, problem.shape);
    reduce_run<2, A>(length, totals, [&](int64_t i, auto lanes, Vector<A>(&sums)[2]) RENORM_LAMBDA {
      Vector<A> value = lanes.load(problem.x + at + i);
      if constexpr (MASKED) {
        const Mask<A> counted = lanes.load_mask(problem.mask + mask_at + i);
        value = counted ? value : Vector<A>{};
        sums[1] += lanes.own(counted ? Vector<A>{} + 1 : Vector<A>{});
      }
      sums[0] += lanes.own(value);
    });
  });
  if constexpr (MASKED) count = int64_t(sum_of_lanes<A>(totals[0][1] + totals[1][1]));
  if (count == 0) return {};
  const A shift = sum_of_lanes<A>(totals[0][0] + totals[1][0]) / A(count);
  const Vector<A> shifts = broadcast(shift);
  Vector<A> sums[2][2] = {};
  chunks.for_runs(channel, index, [&](int64_t at, int64_t mask_at, int64_t length) RENORM_LAMBDA {
    reduce_run<2, A>(length, sums, [&](int64_t i, auto lanes, Vector<A>(&sum)[2]) RENORM_LAMBDA {
      Vector<A> value = lanes.load(problem.x + at + i) - shifts;
      if constexpr (MASKED) value = lanes.load_mask(problem.mask + mask_at + i) ? value : Vector<A>{};
      value = lanes.own(value);
      sum[0] += value;
      sum[1] += value * value;
    });
  });
  const double drift = double(sum_of_lanes<A>(sums[0][0] + sums[1][0])) / count;
  const double squares = sum_of_lanes<A>(sums[0][1] + sums[1][1]);
  return {shift + drift, squares - drift * drift * count, double(count)};
}

template <class A>
Affine<A, Same> affine_at(const Coefficients<A>& coefficients, int64_t index) {
  return {Same<A>(coefficients.center[index]), Same<A>(coefficients.scale[index]),
          Same<A>(coefficients.offset[index])};
}

template <class T, class ACT, bool MASKED>
void forward_planar_unit(const Forward<T>& problem, const Parallel& parallel, int64_t g, int64_t j) {
  using A = Accumulation<T>;
  const Chunks chunks(problem.shape, g);
  const int64_t k = problem.shape.channels_per_group, pieces = k * chunks.per_channel;
  if (problem.rule.source == Source::running) {
    settle(problem, g, j, nullptr);
  } else {
    Buffer<Moments> partial(pieces), channels(k);
    for_pieces(parallel, pieces, k * chunks.elements(), false, [&](int64_t i) {
      partial[i] = moments_of_chunk<T, MASKED>(problem, chunks, j * k + i / chunks.per_channel, i % chunks.per_channel);
    });
    for (int64_t c = 0; c < k; ++c) {
      Moments total = partial[c * chunks.per_channel];
      for (int64_t i = 1; i < chunks.per_channel; ++i) {
        const Moments& next = partial[c * chunks.per_channel + i];
        total.merge(next.mean, next.m2, next.count);
      }
      channels[c] = total;
    }
    settle(problem, g, j, channels.data);
  }
  for_pieces(parallel, pieces, k * chunks.elements(), true, [&](int64_t i) {
    const int64_t channel = j * k + i / chunks.per_channel, index = g * problem.shape.channels + channel;
    const Affine<A, Same> affine = affine_at(problem.coefficients, index);
    chunks.for_runs(channel, i % chunks.per_channel, [&](int64_t at, int64_t mask_at, int64_t length) RENORM_LAMBDA {
      apply_run<T, ACT, MASKED>(problem, at, mask_at, length, affine);
    });
  });
}

template <class T, class ACT, bool MASKED>
Sums sums_of_chunk(const Backward<T>& problem, const Chunks& chunks, int64_t g, int64_t channel, int64_t index) {
  using A = Accumulation<T>;
  const Affine<A, Same> affine = affine_at(problem.coefficients, g * problem.shape.channels + channel);
  Vector<A> sums[2][3] = {};
  chunks.for_runs(channel, index, [&](int64_t at, int64_t mask_at, int64_t length) RENORM_LAMBDA {
    const Streams<T, ACT, MASKED> streams(problem, at, mask_at);
    const int64_t next = at + problem.shape.channels * problem.shape.positions;
    if (next < problem.shape.elements()) {
      prefetch_plane(problem.x + next, problem.shape);
      prefetch_plane(problem.dy + next, problem.shape);
    }
    reduce_run<3, A>(length, sums, [&](int64_t i, auto lanes, Vector<A>(&sum)[3]) RENORM_LAMBDA {
      const Pair<A> pair = streams.pair_at(i, lanes, affine);
      const Vector<A> gradient = lanes.own(pair.gradient), centered = lanes.own(pair.centered);
      sum[0] += gradient;
      sum[1] += centered;
      sum[2] += gradient * centered;
    });
  });
  return {double(sum_of_lanes<A>(sums[0][0] + sums[1][0])), double(sum_of_lanes<A>(sums[0][1] + sums[1][1])),
          double(sum_of_lanes<A>(sums[0][2] + sums[1][2]))};
}

template <class T, class ACT, bool MASKED>
void backward_planar_unit(const Backward<T>& problem, const Parallel& parallel, int64_t g, int64_t j, double* dweight,
                          double* dbias) {
  using A = Accumulation<T>;
  const Chunks chunks(problem.shape, g);
  const int64_t k = problem.shape.channels_per_group, pieces = k * chunks.per_channel;
  Buffer<Sums> partial(pieces), channels(k);
  for_pieces(parallel, pieces, k * chunks.elements(), false, [&](int64_t i) {
    partial[i] =
        sums_of_chunk<T, ACT, MASKED>(problem, chunks, g, j * k + i / chunks.per_channel, i % chunks.per_channel);
  });
  for (int64_t c = 0; c < k; ++c) {
    Sums total;
    for (int64_t i = 0; i < chunks.per_channel; ++i) {
      const Sums& next = partial[c * chunks.per_channel + i];
      total.gradient += next.gradient;
      total.centered += next.centered;
      total.product += next.product;
    }
    channels[c] = total;
  }
  Buffer<Slopes<A>> slopes(k);
  settle(problem, g, j, channels.data, slopes.data, dweight + j * k, dbias + j * k);
  for_pieces(parallel, pieces, k * chunks.elements(), true, [&](int64_t i) {
    const int64_t c = i / chunks.per_channel, channel = j * k + c;
    const Affine<A, Same> affine = affine_at(problem.coefficients, g * problem.shape.channels + channel);
    const SlopesOf<A, Same> slope{Same<A>(slopes[c].gradient), Same<A>(slopes[c].centered),
                                  Same<A>(slopes[c].constant)};
    chunks.for_runs(channel, i % chunks.per_channel, [&](int64_t at, int64_t mask_at, int64_t length) RENORM_LAMBDA {
      differentiate_run<T, ACT, MASKED>(problem, at, mask_at, length, affine, slope);
    });
  });
}

}  // namespace RENORM_ISA
}  // namespace renorm
