// Where a channel's positions lie side by side: a unit is the planes of some channels in an example group.

namespace renorm {
namespace RENORM_ISA {

// The part of a unit that is summed at once: some neighbouring channels, whose planes make a long run of memory, in some
// examples, or a part of one plane.
struct Piece {
  const Shape& shape;
  int64_t begin, end;         // examples
  int64_t channel, channels;
  int64_t start, length;      // positions

  int64_t count() const { return (end - begin) * length; }
  Piece only(int64_t c) const { return {shape, begin, end, channel + c, 1, start, length}; }

  // The offset of the first run of an example, and of the mask's.
  int64_t row(int64_t n) const { return (n * shape.channels + channel) * shape.positions + start; }
  int64_t mask_row(int64_t n) const { return n * shape.positions + start; }

  // body(channel in the piece, offset into x, offset into the mask) for every run
  template <class F>
  RENORM_INLINE void for_runs(F&& body) const {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t c = 0; c < channels; ++c) body(c, row(n) + c * shape.positions, mask_row(n));
  }
};

// A unit and how it is cut. The cut depends on the shape alone, so the result does not depend on the number of threads.
struct Unit {
  static constexpr int64_t kElements = 4096;   // of a channel, in one sum: float holds it well
  static constexpr int64_t kMostChannels = 64;
  static constexpr int64_t kFetchedBytes = 512 * 1024;  // of a unit, beyond which the next one finds no room in the cache
  const Shape& shape;
  int64_t group, first, last;             // examples
  int64_t channel, channels;
  int64_t strip;                          // channels of a piece
  int64_t cuts, length, planes;           // parts of a plane, positions of each; planes of a channel in a piece
  int64_t chunks;                         // pieces of a channel

  Unit(const Shape& shape, int64_t group, int64_t panel)
      : shape(shape), group(group), first(shape.group_begin(group)), last(shape.group_end(group)) {
    const int64_t size = shape.positions, most = channels_per_panel(shape), wide = kLongRun / size;
    channel = panel * most;
    channels = shape.channels - channel < most ? shape.channels - channel : most;
    strip = wide < 1 ? 1 : wide < kMostChannels ? wide : kMostChannels;
    cuts = (size + kElements - 1) / kElements;
    length = size < kElements ? size : kElements;
    planes = size < kElements ? kElements / size : 1;
    chunks = (last - first + planes - 1) / planes * cuts;
  }
  int64_t elements() const { return (last - first) * channels * shape.positions; }
  int64_t pieces() const { return (channels + strip - 1) / strip * chunks; }

  Piece piece(int64_t i) const {
    const int64_t chunk = i % chunks, start = chunk % cuts * length, begin = first + chunk / cuts * planes;
    const int64_t from = i / chunks * strip, rest = shape.positions - start;
    return {shape, begin, begin + planes < last ? begin + planes : last, channel + from,
            channels - from < strip ? channels - from : strip, start, rest < length ? rest : length};
  }
  // How far the next unit's data are, 0 for nothing to fetch.
  int64_t ahead(int64_t bytes) const {
    const bool is_last = channel + channels == shape.channels;
    return is_last || elements() * bytes > kFetchedBytes ? 0 : channels * shape.positions;
  }
  // Where a piece's channel has its sums: those of a channel side by side.
  int64_t slot(const Piece& piece, int64_t c, int64_t i) const {
    return (piece.channel - channel + c) * chunks + i % chunks;
  }
};

// A mean of some elements, to sum the deviations from.
template <class T, bool MASKED>
RENORM_INLINE Accumulation<T> sample_mean(const Forward<T>& problem, int64_t at, int64_t mask_at, int64_t length) {
  using A = Accumulation<T>;
  Vector<A> total{}, counted{};
  const int64_t size = length < 2 * kLanes<A> ? length : 2 * kLanes<A>;
  for_run<A>(size, 0, [&](int64_t i, auto lanes) RENORM_LAMBDA {
    Vector<A> value = lanes.load(problem.x + at + i);
    if constexpr (MASKED) {
      const Mask<A> mask = lanes.load_mask(problem.mask + mask_at + i);
      value = mask ? value : Vector<A>{};
      counted += lanes.own(mask ? Vector<A>{} + 1 : Vector<A>{});
    }
    total += lanes.own(value);
  });
  const A count = MASKED ? sum_of_lanes<A>(counted) : A(size);
  return count > 0 ? sum_of_lanes<A>(total) / count : 0;
}

// Two sets of sums: of x - shift, of its square, and, where there is a mask, of the elements counted.
template <class A, bool MASKED>
using Deviations = Vector<A>[2][MASKED ? 3 : 2];

template <class T, bool MASKED>
RENORM_INLINE void sum_deviations(const Forward<T>& problem, const Piece& piece, const Accumulation<T>* shift,
                                  Deviations<Accumulation<T>, MASKED>* totals) {
  using A = Accumulation<T>;
  constexpr int N = MASKED ? 3 : 2;
  for (int64_t c = 0; c < piece.channels; ++c)
    for (int set = 0; set < 2; ++set)
      for (int i = 0; i < N; ++i) totals[c][set][i] = Vector<A>{};
  piece.for_runs([&](int64_t c, int64_t at, [[maybe_unused]] int64_t mask_at) RENORM_LAMBDA {
    const Vector<A> shifts = broadcast(shift[c]);
    Vector<A> sums[2][N];  // in registers
    for (int set = 0; set < 2; ++set)
      for (int i = 0; i < N; ++i) sums[set][i] = totals[c][set][i];
    reduce_run<N, A>(piece.length, before_aligned<A>(at), sums, [&](int64_t i, auto lanes, Vector<A>(&sum)[N]) RENORM_LAMBDA {
      Vector<A> value = lanes.own(lanes.load(problem.x + at + i) - shifts);
      if constexpr (MASKED) {
        const Mask<A> counted = lanes.load_mask(problem.mask + mask_at + i);
        value = counted ? value : Vector<A>{};
        sum[2] += lanes.own(counted ? Vector<A>{} + 1 : Vector<A>{});
      }
      sum[0] += value;
      sum[1] += value * value;
    });
    for (int set = 0; set < 2; ++set)
      for (int i = 0; i < N; ++i) totals[c][set][i] = sums[set][i];
  });
}

// How far the mean is from the shift, the variance and the count; zeros where nothing counts.
struct Drift {
  double drift = 0, var = 0, count = 0;
};

template <class A, bool MASKED>
Drift drift_of(const Deviations<A, MASKED>& sums, int64_t elements) {
  double count = elements;
  if constexpr (MASKED) count = sum_of_lanes<A>(sums[0][2] + sums[1][2]);
  if (count == 0) return {};
  const double drift = sum_of_lanes<A>(sums[0][0] + sums[1][0]) / count;
  return {drift, sum_of_lanes<A>(sums[0][1] + sums[1][1]) / count - drift * drift, count};
}

template <class T, bool MASKED>
void moments_of_piece(const Forward<T>& problem, const Unit& unit, int64_t index, Moments* partial) {
  using A = Accumulation<T>;
  const Piece piece = unit.piece(index);
  A shift[Unit::kMostChannels];
  Deviations<A, MASKED> totals[Unit::kMostChannels];
  for (int64_t c = 0; c < piece.channels; ++c) {
    const int64_t at = piece.row(piece.begin) + c * problem.shape.positions;
    shift[c] = sample_mean<T, MASKED>(problem, at, piece.mask_row(piece.begin), piece.length);
  }
  sum_deviations<T, MASKED>(problem, piece, shift, totals);
  for (int64_t c = 0; c < piece.channels; ++c) {
    Drift found = drift_of<A, MASKED>(totals[c], piece.count());
    if (strays<double>(found.drift, found.var, shift[c])) {
      shift[c] += A(found.drift);
      sum_deviations<T, MASKED>(problem, piece.only(c), shift + c, totals + c);
      found = drift_of<A, MASKED>(totals[c], piece.count());
    }
    partial[unit.slot(piece, c, index)] = {shift[c] + found.drift, found.var * found.count, found.count};
  }
}

template <class A>
Affine<A, Same> affine_at(const Coefficients<A>& coefficients, int64_t index) {
  return {Same<A>(coefficients.center[index]), Same<A>(coefficients.scale[index]),
          Same<A>(coefficients.offset[index])};
}

template <class T, bool MASKED>
void settle_unit(const Forward<T>& problem, const Parallel& parallel, const Unit& unit) {
  const int64_t k = problem.shape.channels_per_group, first = unit.channel / k, groups = unit.channels / k;
  Buffer<Moments> partial(unit.channels * unit.chunks);
  for_pieces(parallel, unit.pieces(), unit.elements(),
             [&](int64_t i) { moments_of_piece<T, MASKED>(problem, unit, i, partial.data); });
  for (int64_t c = 0; c < unit.channels; ++c) {
    Moments total = partial[c * unit.chunks];
    for (int64_t i = 1; i < unit.chunks; ++i) {
      const Moments& next = partial[c * unit.chunks + i];
      total.merge(next.mean, next.m2, next.count);
    }
    partial[c] = total;
  }
  for (int64_t j = 0; j < groups; ++j) settle(problem, unit.group, first + j, partial.data + j * k);
}

template <class T, class ACT, bool MASKED>
void forward_planar_unit(const Forward<T>& problem, const Parallel& parallel, int64_t g, int64_t panel) {
  using A = Accumulation<T>;
  const Unit unit(problem.shape, g, panel);
  settle_unit<T, MASKED>(problem, parallel, unit);
  const int64_t ahead = unit.ahead(sizeof(T));
  for_pieces(parallel, unit.pieces(), unit.elements(), [&](int64_t i) {
    const Piece piece = unit.piece(i);
    piece.for_runs([&](int64_t c, int64_t at, int64_t mask_at) RENORM_LAMBDA {
      const Affine<A, Same> affine = affine_at(problem.coefficients, g * problem.shape.channels + piece.channel + c);
      apply_run<T, ACT, MASKED>(problem, at, mask_at, piece.length, affine, ahead);
    });
  });
}

// By the running statistics, which need no pass of their own: plane after plane, in the order of memory.
template <class T, class ACT, bool MASKED>
void forward_planes(const Forward<T>& problem) {
  using A = Accumulation<T>;
  const Shape& shape = problem.shape;
  for (int64_t j = 0; j < shape.channel_groups(); ++j) settle(problem, 0, j, nullptr);
  for_pieces(problem.parallel, shape.examples * shape.channels, shape.elements(), [&](int64_t plane) {
    const Affine<A, Same> affine = affine_at(problem.coefficients, plane % shape.channels);
    apply_run<T, ACT, MASKED>(problem, plane * shape.positions, plane / shape.channels * shape.positions,
                              shape.positions, affine);
  });
}

template <class T, class ACT, bool MASKED>
void sums_of_piece(const Backward<T>& problem, const Unit& unit, int64_t index, Sums* partial) {
  using A = Accumulation<T>;
  const Piece piece = unit.piece(index);
  const int64_t first = unit.group * problem.shape.channels + piece.channel;
  Vector<A> totals[Unit::kMostChannels][3];
  for (int64_t c = 0; c < piece.channels; ++c)
    for (int i = 0; i < 3; ++i) totals[c][i] = Vector<A>{};
  piece.for_runs([&](int64_t c, int64_t at, int64_t mask_at) RENORM_LAMBDA {
    const Affine<A, Same> affine = affine_at(problem.coefficients, first + c);
    const Streams<T, ACT, MASKED> streams(problem, at, mask_at);
    Vector<A> sums[2][3] = {};
    reduce_run<3, A>(piece.length, before_aligned<A>(at), sums, [&](int64_t i, auto lanes, Vector<A>(&sum)[3]) RENORM_LAMBDA {
      const Pair<A> pair = streams.pair_at(i, lanes, affine.at(i, lanes));
      const Vector<A> gradient = lanes.own(pair.gradient), centered = lanes.own(pair.centered);
      sum[0] += gradient;
      sum[1] += centered;
      sum[2] += gradient * centered;
    });
    for (int i = 0; i < 3; ++i) totals[c][i] += sums[0][i] + sums[1][i];
  });
  for (int64_t c = 0; c < piece.channels; ++c)
    partial[unit.slot(piece, c, index)] = {double(sum_of_lanes<A>(totals[c][0])), double(sum_of_lanes<A>(totals[c][1])),
                                           double(sum_of_lanes<A>(totals[c][2]))};
}

template <class T, class ACT, bool MASKED>
void backward_planar_unit(const Backward<T>& problem, const Parallel& parallel, int64_t g, int64_t panel,
                          double* dweight, double* dbias) {
  using A = Accumulation<T>;
  const Unit unit(problem.shape, g, panel);
  const int64_t k = problem.shape.channels_per_group;
  Buffer<Sums> partial(unit.channels * unit.chunks);
  for_pieces(parallel, unit.pieces(), unit.elements(),
             [&](int64_t i) { sums_of_piece<T, ACT, MASKED>(problem, unit, i, partial.data); });
  for (int64_t c = 0; c < unit.channels; ++c) {
    Sums total;
    for (int64_t i = 0; i < unit.chunks; ++i) {
      const Sums& next = partial[c * unit.chunks + i];
      total.gradient += next.gradient;
      total.centered += next.centered;
      total.product += next.product;
    }
    partial[c] = total;
  }
  Buffer<Slopes<A>> slopes(unit.channels);
  for (int64_t c = 0; c < unit.channels; c += k)
    settle(problem, g, (unit.channel + c) / k, partial.data + c, slopes.data + c, dweight + unit.channel + c,
           dbias + unit.channel + c);
  const int64_t ahead = unit.ahead(2 * sizeof(T));
  for_pieces(parallel, unit.pieces(), unit.elements(), [&](int64_t i) {
    const Piece piece = unit.piece(i);
    piece.for_runs([&](int64_t c, int64_t at, int64_t mask_at) RENORM_LAMBDA {
      const Affine<A, Same> affine = affine_at(problem.coefficients, g * problem.shape.channels + piece.channel + c);
      const Slopes<A>& slope = slopes[piece.channel - unit.channel + c];
      const SlopesOf<A, Same> same{Same<A>(slope.gradient), Same<A>(slope.centered), Same<A>(slope.constant)};
      differentiate_run<T, ACT, MASKED>(problem, at, mask_at, piece.length, affine, same, ahead);
    });
  });
}

}  // namespace RENORM_ISA
}  // namespace renorm
