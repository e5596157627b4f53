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
  // totals[c] = the sums that body adds up over the channel's runs: body(channel, offset, offset into the mask, sums)
  template <int N, class A, class F>
  RENORM_INLINE void sum_runs(Vector<A> (*totals)[N], F&& body) const {
    for_runs([&](int64_t c, int64_t at, int64_t mask_at) RENORM_LAMBDA {
      Vector<A> sums[2][N] = {};
      body(c, at, mask_at, sums);
      const bool is_first = at < row(begin + 1);
#pragma GCC unroll 3
      for (int i = 0; i < N; ++i) totals[c][i] = is_first ? sums[0][i] + sums[1][i] : totals[c][i] + (sums[0][i] + sums[1][i]);
    });
  }
};

// A unit and how it is cut. The cut depends on the shape alone, so the result does not depend on the number of threads.
struct Unit {
  static constexpr int64_t kElements = 4096;   // of a channel, in one sum: float holds it well
  static constexpr int64_t kMostChannels = 64;  // of a piece
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
  // Which part of its channels a piece is, and where these begin among the unit's.
  int64_t chunk(int64_t i) const { return i % chunks; }
  int64_t first_channel(int64_t i) const { return i / chunks * strip; }
};

// How many elements of each of a piece's channels the mask lets count.
template <bool MASKED, class T>
int64_t count_of(const Forward<T>& problem, const Piece& piece) {
  if (!MASKED) return piece.count();
  int64_t counted = 0;
  for (int64_t n = piece.begin; n < piece.end; ++n)
    for (int64_t i = 0; i < piece.length; ++i) counted += problem.mask[piece.mask_row(n) + i] != 0;
  return counted;
}

// To sum the deviations from: the mean of each channel's first elements that count. Few are as good as many: what
// matters is to be some standard deviations away at most.
template <bool MASKED, class T>
void sample(const Forward<T>& problem, const Piece& piece, Accumulation<T>* to) {
  constexpr int64_t kFew = 4;
  const int64_t first = piece.row(piece.begin);
  int64_t offsets[kFew], count = 0;
  for (int64_t n = piece.begin; n < piece.end && count < kFew; ++n)
    for (int64_t i = 0; i < piece.length && count < kFew; ++i)
      if (!MASKED || problem.mask[piece.mask_row(n) + i]) offsets[count++] = piece.row(n) - first + i;
  for (int64_t c = 0; c < piece.channels; ++c) {
    const T* x = problem.x + first + c * problem.shape.positions;
    Accumulation<T> total = 0;
    for (int64_t i = 0; i < count; ++i) total += value_of(x[offsets[i]]);
    to[c] = count ? total / Accumulation<T>(count) : 0;
  }
}

// Sums of x - shift and of its square over the channels of a piece.
template <class T, bool MASKED>
__attribute__((noinline)) void sum_deviations(const Forward<T>& problem, const Piece& piece,
                                              const Accumulation<T>* shift, double* sums, double* squares) {
  using A = Accumulation<T>;
  Vector<A> totals[Unit::kMostChannels][2];
  piece.sum_runs<2, A>(totals, [&](int64_t c, int64_t at, [[maybe_unused]] int64_t mask_at, Vector<A>(&sums)[2][2]) RENORM_LAMBDA {
    const Vector<A> shifts = broadcast(shift[c]);
    reduce_run<2, A>(piece.length, before_aligned<A>(at, piece.length), sums, [&](int64_t i, auto lanes, Vector<A>(&sum)[2]) RENORM_LAMBDA {
      Vector<A> value = lanes.own(lanes.load(problem.x + at + i) - shifts);
      if constexpr (MASKED) value = lanes.load_mask(problem.mask + mask_at + i) ? value : Vector<A>{};
      sum[0] += value;
      sum[1] += value * value;
    });
  });
  sum_lanes<A, 2>(totals, 0, piece.channels, sums);
  sum_lanes<A, 2>(totals, 1, piece.channels, squares);
}

// Moments of a piece's channels, from sums of deviations; summed anew where these lost digits.
template <class T, bool MASKED>
void moments_of_piece(const Forward<T>& problem, const Piece& piece, Moments& moments) {
  using A = Accumulation<T>;
  A shift[Unit::kMostChannels];
  double sums[Unit::kMostChannels], squares[Unit::kMostChannels];
  moments.count = count_of<MASKED>(problem, piece);
  const double share = moments.count > 0 ? 1 / moments.count : 0;
  bool strayed = false;
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const double drift = sums[c] * share, var = squares[c] * share - drift * drift;
      strayed |= strays<double>(drift, var, shift[c]);
      moments.mean[c] = shift[c] + drift;
      moments.m2[c] = var * moments.count;
    }
  };
  sample<MASKED>(problem, piece, shift);
  sum_deviations<T, MASKED>(problem, piece, shift, sums, squares);
  take(0, piece.channels);
  for (int64_t c = 0; strayed && c < piece.channels; ++c) {
    shift[c] = A(moments.mean[c]);
    sum_deviations<T, MASKED>(problem, piece.only(c), shift + c, sums + c, squares + c);
    take(c, c + 1);
  }
}

template <class A>
Affine<A, Same> affine_at(const Coefficients<A>& coefficients, int64_t index) {
  return {Same<A>(coefficients.center[index]), Same<A>(coefficients.scale[index]),
          Same<A>(coefficients.offset[index])};
}

template <class T, bool MASKED>
void settle_unit(const Forward<T>& problem, const Parallel& parallel, const Unit& unit) {
  const int64_t channels = unit.channels;
  Buffer<double> rows(2 * unit.chunks * channels);
  Buffer<double> counts(unit.chunks);
  const auto moments_of = [&](int64_t chunk) {
    double* mean = rows.data + 2 * chunk * channels;
    return Moments{mean, mean + channels, counts[chunk]};
  };
  for_pieces(parallel, unit.pieces(), unit.elements(), [&](int64_t i) {
    const Moments all = moments_of(unit.chunk(i));
    Moments own{all.mean + unit.first_channel(i), all.m2 + unit.first_channel(i), 0};
    moments_of_piece<T, MASKED>(problem, unit.piece(i), own);
    if (unit.first_channel(i) == 0) counts[unit.chunk(i)] = own.count;
  });
  Moments total = moments_of(0);
  for (int64_t chunk = 1; chunk < unit.chunks; ++chunk) total.merge(moments_of(chunk), channels);
  settle(problem, unit.group, unit.channel, channels, &total);
}

template <class T, class ACT, bool MASKED>
void apply_piece(const Forward<T>& problem, const Piece& piece, int64_t g, int64_t ahead) {
  piece.for_runs([&](int64_t c, int64_t at, int64_t mask_at) RENORM_LAMBDA {
    const int64_t channel = g * problem.shape.channels + piece.channel + c;
    apply_run<T, ACT, MASKED>(problem, at, mask_at, piece.length, affine_at(problem.coefficients, channel), ahead);
  });
}

template <class T, class ACT, bool MASKED>
void forward_planar_unit(const Forward<T>& problem, const Parallel& parallel, int64_t g, int64_t panel) {
  const Unit unit(problem.shape, g, panel);
  settle_unit<T, MASKED>(problem, parallel, unit);
  const int64_t ahead = unit.ahead((problem.residual ? 2 : 1) * sizeof(T));
  for_pieces(parallel, unit.pieces(), unit.elements(),
             [&](int64_t i) { apply_piece<T, ACT, MASKED>(problem, unit.piece(i), g, ahead); });
}

// By the running statistics, which need no pass of their own: plane after plane, in the order of memory.
template <class T, class ACT, bool MASKED>
void forward_planes(const Forward<T>& problem) {
  const Shape& shape = problem.shape;
  settle(problem, 0, 0, shape.channels, nullptr);
  for_pieces(problem.parallel, shape.examples * shape.channels, shape.elements(), [&](int64_t plane) {
    const int64_t n = plane / shape.channels, c = plane % shape.channels;
    apply_piece<T, ACT, MASKED>(problem, {shape, n, n + 1, c, 1, 0, shape.positions}, 0, 0);
  });
}

template <class T, class ACT, bool MASKED>
void sums_of_piece(const Backward<T>& problem, const Piece& piece, int64_t first, const Sums& to) {
  using A = Accumulation<T>;
  Vector<A> totals[Unit::kMostChannels][3];
  piece.sum_runs<3, A>(totals, [&](int64_t c, int64_t at, int64_t mask_at, Vector<A>(&sums)[2][3]) RENORM_LAMBDA {
    const Affine<A, Same> affine = affine_at(problem.coefficients, first + c);
    const Streams<T, ACT, MASKED> streams(problem, at, mask_at);
    reduce_run<3, A>(piece.length, before_aligned<A>(at, piece.length), sums, [&](int64_t i, auto lanes, Vector<A>(&sum)[3]) RENORM_LAMBDA {
      const Pair<A> pair = streams.pair_at(i, lanes, affine.at(i, lanes));
      const Vector<A> gradient = lanes.own(pair.gradient), centered = lanes.own(pair.centered);
      sum[0] += gradient;
      sum[1] += centered;
      sum[2] += gradient * centered;
    });
  });
  sum_lanes<A, 3>(totals, 0, piece.channels, to.gradient);
  sum_lanes<A, 3>(totals, 1, piece.channels, to.centered);
  sum_lanes<A, 3>(totals, 2, piece.channels, to.product);
}

template <class T, class ACT, bool MASKED>
void backward_planar_unit(const Backward<T>& problem, const Parallel& parallel, int64_t g, int64_t panel,
                          double* dweight, double* dbias) {
  using A = Accumulation<T>;
  const Unit unit(problem.shape, g, panel);
  const int64_t channels = unit.channels, first = g * problem.shape.channels + unit.channel;
  Buffer<double> partial(Sums::rows * unit.chunks * channels);
  for_pieces(parallel, unit.pieces(), unit.elements(), [&](int64_t i) {
    const int64_t channel = unit.first_channel(i);
    const Sums own(partial.data + Sums::rows * unit.chunk(i) * channels + channel, channels);
    sums_of_piece<T, ACT, MASKED>(problem, unit.piece(i), first + channel, own);
  });
  for (int64_t chunk = 1; chunk < unit.chunks; ++chunk)
    for (int64_t i = 0; i < Sums::rows * channels; ++i) partial[i] += partial[chunk * Sums::rows * channels + i];
  Buffer<A> rows(Slopes<A>::rows * channels);
  const Slopes<A> slopes(rows.data, channels);
  settle(problem, g, unit.channel, channels, Sums(partial.data, channels), slopes, dweight + unit.channel,
         dbias + unit.channel);
  const int64_t ahead = unit.ahead((problem.y ? 3 : 2) * sizeof(T));
  for_pieces(parallel, unit.pieces(), unit.elements(), [&](int64_t i) {
    const Piece piece = unit.piece(i);
    piece.for_runs([&](int64_t c, int64_t at, int64_t mask_at) RENORM_LAMBDA {
      const Affine<A, Same> affine = affine_at(problem.coefficients, g * problem.shape.channels + piece.channel + c);
      const int64_t j = piece.channel - unit.channel + c;
      const SlopesOf<A, Same> same{Same<A>(slopes.gradient[j]), Same<A>(slopes.centered[j]), Same<A>(slopes.constant[j])};
      differentiate_run<T, ACT, MASKED>(problem, at, mask_at, piece.length, affine, same, ahead);
    });
  });
}

}  // namespace RENORM_ISA
}  // namespace renorm
