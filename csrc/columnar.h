// Where channels lie side by side: a unit is rows of columns, each column with sums of its own.
//
// Channels last: a row is a position, its columns are the channels; where these are few, several positions make a
// row. Few positions per plane: a row is an example, its columns are the positions of several channels.

namespace renorm {
namespace RENORM_ISA {

struct Region {
  static constexpr int64_t kBlockRows = 128;  // of which float holds the sums well
  static constexpr int64_t kMostSegments = 64, kEvenly = 4;
  int64_t offset, rows, stride, width, leftover;  // a last, shorter row has `leftover` columns
  int64_t first_channel, channels;
  bool cyclic;        // whether column j is channel j % channels, or channel j / (columns per channel)
  int64_t mask_offset;

  int64_t columns_per_channel() const { return width / channels; }
  // Sums the columns of each channel, in place.
  void sum_columns(double* row) const {
    const int64_t columns = columns_per_channel();
    if (cyclic) {
      for (int64_t i = 1; i < columns; ++i)
        for (int64_t c = 0; c < channels; ++c) row[c] += row[i * channels + c];
      return;
    }
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = 0; i < columns; ++i) total += row[c * columns + i];
      row[c] = total;
    }
  }
  // What one thread takes: a block or several, so many that few threads share them evenly, and few to merge.
  int64_t segment_rows() const {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
    const int64_t even = blocks < 2 ? 1 : (blocks + kEvenly - 1) / kEvenly * kEvenly;
    const int64_t count = even < kMostSegments ? even : kMostSegments, least = (rows + count - 1) / count;
    return (least + kEvenly - 1) / kEvenly * kEvenly;
  }
  int64_t segments() const { return rows ? (rows + segment_rows() - 1) / segment_rows() : 0; }
  int64_t segment_end(int64_t segment) const {
    const int64_t end = (segment + 1) * segment_rows();
    return end < rows ? end : rows;
  }
  int64_t elements() const { return rows * width + leftover; }
  // A byte for every row, or null.
  template <class P>
  const uint8_t* mask(const P& problem) const { return problem.mask ? problem.mask + mask_offset : nullptr; }
};

// How far ahead of a row the data are fetched: the whole rows of two pages, or one row.
inline int64_t fetched_ahead(int64_t stride) {
  constexpr int64_t kFarEnough = 2048;
  return stride >= kFarEnough ? stride : kFarEnough / stride * stride;
}

inline int64_t positions_per_row(const Shape& shape, bool masked) {
  constexpr int64_t kWide = 256;
  if (masked || shape.channels >= kWide) return 1;
  int64_t whole = 1;  // as many as make the row whole vectors
  while (whole * shape.channels % kFloats != 0) ++whole;
  return whole * ((kWide + whole * shape.channels - 1) / (whole * shape.channels));
}

inline Region rows_of_positions(const Shape& shape, int64_t g, bool masked) {
  const int64_t first = shape.group_begin(g), repeat = positions_per_row(shape, masked);
  const int64_t positions = (shape.group_end(g) - first) * shape.positions, width = repeat * shape.channels;
  return {first * shape.positions * shape.channels, positions / repeat, width, width,
          positions % repeat * shape.channels, 0, shape.channels, true, first * shape.positions};
}

inline Region rows_of_examples(const Shape& shape, int64_t g, int64_t panel) {
  const int64_t first = shape.group_begin(g), begin = panel * channels_per_panel(shape);
  const int64_t rest = shape.channels - begin, most = channels_per_panel(shape), channels = rest < most ? rest : most;
  return {(first * shape.channels + begin) * shape.positions, shape.group_end(g) - first,
          shape.channels * shape.positions, channels * shape.positions, 0, begin, channels, false, 0};
}

template <int N> struct Rows { static constexpr int count = N; };

// Calls body(row, rows) for the rows of a block that count: MANY at a time where there is no mask, else one by one.
template <int MANY, class F>
RENORM_INLINE int64_t for_rows(const uint8_t* mask, int64_t begin, int64_t end, F&& body) {
  int64_t row = begin, counted = 0;
  for (; !mask && row + MANY <= end; row += MANY, counted += MANY) body(row, Rows<MANY>{});
  for (; row < end; ++row) {
    if (mask && !mask[row]) continue;
    body(row, Rows<1>{});
    ++counted;
  }
  return counted;
}

// Moments of every column of a segment, from sums of deviations from a shift: the mean so far.
template <class T>
struct Columns {
  using A = Accumulation<T>;
  const Forward<T>& problem;
  const Region& region;
  Moments& moments;  // of what was added
  Buffer<A> shift, sums, squares;

  Columns(const Forward<T>& problem, const Region& region, Moments& moments)
      : problem(problem), region(region), moments(moments), shift(region.width), sums(region.width),
        squares(region.width) {
    for (int64_t j = 0; j < region.width; ++j) moments.mean[j] = moments.m2[j] = 0;
  }

  // Shifts by the mean of the first rows.
  void start(int64_t begin, int64_t end) {
    constexpr int64_t kSample = 4;
    for (int64_t j = 0; j < region.width; ++j) shift[j] = 0;
    const int64_t counted = sum(begin, begin + kSample < end ? begin + kSample : end);
    for (int64_t j = 0; counted && j < region.width; ++j) shift[j] = sums[j] / A(counted);
  }

  // Sums over rows, and how many of them counted.
  int64_t sum(int64_t begin, int64_t end) {
    const int64_t stride = region.stride, width = region.width;
    const T* x = problem.x + region.offset;
    const uint8_t* mask = region.mask(problem);
    A *to_sums = sums.data, *to_squares = squares.data;
    const A* shifts = shift.data;
    for (int64_t j = 0; j < width; ++j) to_sums[j] = to_squares[j] = 0;
    return for_rows<4>(mask, begin, end, [&](int64_t row, auto rows) RENORM_LAMBDA {
      const T* from = x + row * stride;
      const int64_t ahead = problem.past_cache ? fetched_ahead(rows.count * stride) : 0;
      for_run<A>(width, 0, [&](int64_t i, auto lanes) RENORM_LAMBDA {
        const Vector<A> by = lanes.load(shifts + i);
        Vector<A> total{}, square{};
        for (int r = 0; r < rows.count; ++r) {
          const Vector<A> value = lanes.load(from + r * stride + i) - by;
          if (ahead) fetch(from + r * stride + i + ahead);
          total += value;
          square += value * value;
        }
        lanes.store(to_sums + i, lanes.load(to_sums + i) + lanes.own(total));
        lanes.store(to_squares + i, lanes.load(to_squares + i) + lanes.own(square));
      });
    });
  }

  // Moves the shift to where the sums say the mean is, if it was too far from it.
  bool strayed(int64_t counted) {
    const A each = A(1) / A(counted);
    bool far = false;
    for (int64_t j = 0; j < region.width; ++j) {
      const A drift = sums[j] * each;
      far |= strays<A>(drift, squares[j] * each - drift * drift, shift[j]);
    }
    for (int64_t j = 0; far && j < region.width; ++j) shift[j] += sums[j] * each;
    return far;
  }

  void add(int64_t begin, int64_t end) {
    const int64_t counted = sum(begin, end);
    if (counted == 0) return;
    if (strayed(counted)) sum(begin, end);
    const double before = moments.count, each = 1.0 / counted, share = counted / (before + counted);
    for (int64_t j = 0; j < region.width; ++j) {
      const double drift = sums[j] * each, delta = shift[j] + drift - moments.mean[j];
      moments.m2[j] += squares[j] - sums[j] * drift + delta * delta * before * share;
      moments.mean[j] += delta * share;
      shift[j] = A(moments.mean[j]);
    }
    moments.count += counted;
  }
};

// The moments of the region's channels, in the place of those of its columns, which all have the same count.
template <class T>
void merge_columns(const Forward<T>& problem, const Region& region, Moments& moments) {
  const int64_t columns = region.columns_per_channel(), channels = region.channels;
  if (columns > 1) {
    const int64_t step = region.cyclic ? channels : 1, apart = region.cyclic ? 1 : columns;
    Buffer<double> means(region.width);
    __builtin_memcpy(means.data, moments.mean, region.width * sizeof(double));
    region.sum_columns(moments.mean);
    for (int64_t c = 0; c < channels; ++c) moments.mean[c] /= double(columns);
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t c = 0; c < channels; ++c) {
        const double delta = means[c * apart + i * step] - moments.mean[c];
        moments.m2[c * apart + i * step] += moments.count * delta * delta;
      }
    region.sum_columns(moments.m2);
    moments.count *= double(columns);
  }
  using A = Accumulation<T>;
  Buffer<A> last(region.leftover + kFloats);
  for_run<A>(region.leftover, 0, [&](int64_t i, auto lanes) RENORM_LAMBDA {
    lanes.store(last.data + i, lanes.load(problem.x + region.offset + region.rows * region.stride + i));
  });
  Buffer<double> values(2 * channels);
  for (int64_t begin = 0; begin < region.leftover; begin += channels) {
    for (int64_t c = 0; c < channels; ++c) values[c] = last[begin + c];
    for (int64_t c = 0; c < channels; ++c) values[channels + c] = 0;
    moments.merge({values.data, values.data + channels, 1}, channels);
  }
}

// The moments of the region's channels, in the buffer of two rows that is given.
template <class T>
Moments region_moments(const Forward<T>& problem, const Parallel& parallel, const Region& region, double* rows) {
  const int64_t width = region.width, segments = region.segments();
  Buffer<double> others((segments < 2 ? 0 : segments - 1) * 2 * width), counts(segments + 1);
  const auto moments_of = [&](int64_t segment) {
    double* mean = segment == 0 ? rows : others.data + 2 * (segment - 1) * width;
    return Moments{mean, mean + width, counts[segment]};
  };
  for_pieces(parallel, segments, region.elements(), [&](int64_t segment) {
    counts[segment] = 0;
    Moments moments = moments_of(segment);
    Columns<T> columns(problem, region, moments);
    const int64_t begin = segment * region.segment_rows(), end = region.segment_end(segment), size = Region::kBlockRows;
    columns.start(begin, end);
    for (int64_t row = begin; row < end; row += size) columns.add(row, row + size < end ? row + size : end);
    counts[segment] = moments.count;
  });
  if (segments == 0) {
    counts[0] = 0;
    for (int64_t j = 0; j < 2 * width; ++j) rows[j] = 0;
  }
  Moments total = moments_of(0);
  for (int64_t segment = 1; segment < segments; ++segment) total.merge(moments_of(segment), width);
  merge_columns(problem, region, total);
  return total;
}

// One number per column from one per channel; the channels' own where there is one column for each.
template <class A>
struct Spread {
  Buffer<A> buffer;
  const A* values;
  Spread(const Region& region, const A* channels) : buffer(region.width + 1), values(channels) {
    const int64_t columns = region.columns_per_channel();
    if (columns == 1) return;
    values = buffer.data;
    if (region.cyclic) {
      for (int64_t i = 0; i < columns; ++i)
        __builtin_memcpy(buffer.data + i * region.channels, channels, region.channels * sizeof(A));
      return;
    }
    for (int64_t c = 0; c < region.channels; ++c)
      for (int64_t i = 0; i < columns; ++i) buffer[c * columns + i] = channels[c];
  }
};

template <class A>
struct SpreadAffine {
  Spread<A> center, scale, offset;
  SpreadAffine(const Coefficients<A>& c, const Region& region, int64_t at)
      : center(region, c.center + at), scale(region, c.scale + at), offset(region, c.offset + at) {}
  Affine<A, Each> affine() const { return {{center.values}, {scale.values}, {offset.values}}; }
};

// body(offset, column, columns, row) for every row of the region; of wide ones in parts, whose coefficients stay in the
// first-level cache.
template <class F>
RENORM_INLINE void for_all_rows(const Parallel& parallel, const Region& region, F&& body) {
  const int64_t segments = region.segments();
  for_pieces(parallel, segments + (region.leftover > 0), region.elements(), [&](int64_t segment) {
    const bool is_last = segment == segments;  // the shorter row
    const int64_t begin = is_last ? region.rows : segment * region.segment_rows();
    const int64_t end = is_last ? region.rows + 1 : region.segment_end(segment);
    const int64_t width = is_last ? region.leftover : region.width;
    for (int64_t column = 0; column < width; column += kLongRun) {
      const int64_t rest = width - column, columns = rest < kLongRun ? rest : kLongRun;
      for (int64_t row = begin; row < end; ++row)
        body(region.offset + row * region.stride + column, column, columns, row);
    }
  });
}

template <class T, class ACT>
void apply_region(const Forward<T>& problem, const Parallel& parallel, const Region& region, int64_t g) {
  using A = Accumulation<T>;
  const SpreadAffine<A> spread(problem.coefficients, region, g * problem.shape.channels + region.first_channel);
  const Affine<A, Each> affine = spread.affine();
  const uint8_t* mask = region.mask(problem);
  const int64_t ahead = problem.past_cache ? fetched_ahead(region.stride) : 0;
  for_all_rows(parallel, region, [&](int64_t at, int64_t column, int64_t columns, int64_t row) RENORM_LAMBDA {
    if (mask && !mask[row]) {
      __builtin_memset(problem.y + at, 0, columns * sizeof(T));
      return;
    }
    apply_run<T, ACT, false>(problem, at, 0, columns, affine.from(column), ahead);
  });
}

template <class T, class ACT>
void forward_region(const Forward<T>& problem, const Parallel& parallel, int64_t g, const Region& region) {
  if (problem.rule.source == Source::running) {
    settle(problem, g, region.first_channel, region.channels, nullptr);
  } else {
    Buffer<double> rows(2 * region.width);
    const Moments moments = region_moments<T>(problem, parallel, region, rows.data);
    settle(problem, g, region.first_channel, region.channels, &moments);
  }
  apply_region<T, ACT>(problem, parallel, region, g);
}

// Adds the block's sums of every column to `sums`, three rows of the region's width; and writes the gradient before the
// activation to `kept`, if any.
template <class T, class ACT>
void add_block(const Backward<T>& problem, const Region& region, int64_t begin, int64_t end,
               const Affine<Accumulation<T>, Each> affine, int64_t width, T* kept, Accumulation<T>* scratch,
               double* sums) {
  using A = Accumulation<T>;
  for (int64_t j = 0; j < 3 * region.width; ++j) scratch[j] = 0;
  const int64_t stride = region.stride;
  A *gradient = scratch, *centered = scratch + region.width, *product = scratch + 2 * region.width;
  const uint8_t* mask = region.mask(problem);
  const bool past_cache = passes_cache(problem.past_cache, kept, region.offset | stride, width);
  for_rows<2>(mask, begin, end, [&](int64_t row, auto rows) RENORM_LAMBDA {
    T* to = kept ? kept + region.offset + row * stride : nullptr;
    const Streams<T, ACT, false> streams(problem, region.offset + row * stride, 0);
    const int64_t ahead = problem.past_cache ? fetched_ahead(rows.count * stride) : 0;
    for_run<A>(width, 0, [&](int64_t i, auto lanes) RENORM_LAMBDA {
      const AffineAt<A> by = affine.at(i, lanes);
      Vector<A> sum[3] = {};
      for (int r = 0; r < rows.count; ++r) {
        const int64_t at = r * stride + i;
        const Pair<A> pair = streams.pair_at(at, lanes, by);
        if (to) lanes.store(to + at, pair.gradient, past_cache);
        if (ahead) {
          fetch(streams.x + at + ahead);
          fetch(streams.dy + at + ahead);
          if constexpr (!ACT::is_none)
            if (streams.y) fetch(streams.y + at + ahead);
        }
        sum[0] += pair.gradient;
        sum[1] += pair.centered;
        sum[2] += pair.gradient * pair.centered;
      }
      lanes.store(gradient + i, lanes.load(gradient + i) + lanes.own(sum[0]));
      lanes.store(centered + i, lanes.load(centered + i) + lanes.own(sum[1]));
      lanes.store(product + i, lanes.load(product + i) + lanes.own(sum[2]));
    });
  });
  for (int64_t j = 0; j < 3 * region.width; ++j) sums[j] += scratch[j];
}

// The sums over the region's channels, in the place of those over its columns: three rows of the region's width.
template <class T, class ACT>
Sums region_sums(const Backward<T>& problem, const Parallel& parallel, const Region& region,
                 const Affine<Accumulation<T>, Each>& affine, T* kept, double* columns) {
  const int64_t width = region.width, segments = region.segments(), size = Sums::rows * width;
  Buffer<double> partial((segments + 1) * size);
  for_pieces(parallel, segments, region.elements(), [&](int64_t segment) {
    Buffer<Accumulation<T>> scratch(size);
    double* to = partial.data + segment * size;
    for (int64_t j = 0; j < size; ++j) to[j] = 0;
    const int64_t end = region.segment_end(segment), block = Region::kBlockRows;
    for (int64_t row = segment * region.segment_rows(); row < end; row += block)
      add_block<T, ACT>(problem, region, row, row + block < end ? row + block : end, affine, width, kept, scratch.data,
                        to);
  });
  double* last = partial.data + segments * size;
  for (int64_t j = 0; j < size; ++j) columns[j] = last[j] = 0;
  if (region.leftover) {
    Buffer<Accumulation<T>> scratch(size);
    add_block<T, ACT>(problem, region, region.rows, region.rows + 1, affine, region.leftover, kept, scratch.data,
                      last);
  }
  for (int64_t piece = 0; piece <= segments; ++piece)
    for (int64_t j = 0; j < size; ++j) columns[j] += partial[piece * size + j];
  const Sums sums(columns, width);
  for (int64_t i = 0; i < Sums::rows; ++i) region.sum_columns(columns + i * width);
  return sums;
}

// Whether writing the gradient before the activation loses nothing to half precision: these make it dy or 0.
template <class T>
bool keeps_gradient(Act act) {
  return sizeof(T) == sizeof(Accumulation<T>) || act == Act::none || act == Act::relu || act == Act::relu6;
}

template <class T, class ACT>
void differentiate_region(const Backward<T>& problem, const Parallel& parallel, const Region& region,
                          const Affine<Accumulation<T>, Each>& affine, const SlopesOf<Accumulation<T>, Each>& slopes) {
  const uint8_t* mask = region.mask(problem);
  const int64_t ahead = problem.past_cache ? fetched_ahead(region.stride) : 0;
  for_all_rows(parallel, region, [&](int64_t at, int64_t column, int64_t columns, int64_t row) RENORM_LAMBDA {
    if (mask && !mask[row]) {
      __builtin_memset(problem.dx + at, 0, columns * sizeof(T));
      if (problem.dresidual) __builtin_memset(problem.dresidual + at, 0, columns * sizeof(T));
      return;
    }
    differentiate_run<T, ACT, false>(problem, at, 0, columns, affine.from(column), slopes.from(column), ahead);
  });
}

template <class T, class ACT>
void backward_region(const Backward<T>& problem, const Parallel& parallel, int64_t g, const Region& region,
                     double* dweight, double* dbias) {
  using A = Accumulation<T>;
  const int64_t first = region.first_channel, count = region.channels;
  const SpreadAffine<A> spread(problem.coefficients, region, g * problem.shape.channels + first);
  const Affine<A, Each> affine = spread.affine();
  Buffer<double> columns(Sums::rows * region.width);
  // Under a mask the first pass does not come to all rows.
  T* const kept = !problem.mask && keeps_gradient<T>(problem.act) ? problem.dresidual : nullptr;
  const Sums sums = region_sums<T, ACT>(problem, parallel, region, affine, kept, columns.data);
  Buffer<A> rows(Slopes<A>::rows * count);
  const Slopes<A> slopes(rows.data, count);
  settle(problem, g, first, count, sums, slopes, dweight + first, dbias + first);
  const Spread<A> gradient(region, slopes.gradient), centered(region, slopes.centered), constant(region, slopes.constant);
  const SlopesOf<A, Each> slope{{gradient.values}, {centered.values}, {constant.values}};
  if (!kept) return differentiate_region<T, ACT>(problem, parallel, region, affine, slope);
  // What was kept is read instead of all that it was computed from.
  Backward<T> rest = problem;
  rest.dy = kept;
  rest.dresidual = nullptr;
  differentiate_region<T, Fixed<Act::none>>(rest, parallel, region, affine, slope);
}

}  // namespace RENORM_ISA
}  // namespace renorm
