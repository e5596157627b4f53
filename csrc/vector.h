// Vectors of the instruction set that includes this file: RENORM_ISA names it, RENORM_VECTOR_BYTES is their width.
#include "problem.h"

namespace renorm {
namespace RENORM_ISA {

#define RENORM_INLINE inline __attribute__((always_inline))

template <class A> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(RENORM_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(RENORM_VECTOR_BYTES)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(RENORM_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(RENORM_VECTOR_BYTES)));
};
template <class A> using Vector = typename VectorOf<A>::type;
template <class A> using Mask = typename VectorOf<A>::mask;
template <class A> using Lane = decltype(Mask<A>{}[0] + Mask<A>{}[0]);  // the integer of a lane's size
template <class A> constexpr int64_t kLanes = RENORM_VECTOR_BYTES / sizeof(A);

constexpr int64_t kFloats = kLanes<float>;
typedef uint32_t Words __attribute__((vector_size(RENORM_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(RENORM_VECTOR_BYTES / 2)));

// Keeps a load from becoming one under a mask: that would wait until what the mask is computed from is there, which
// takes nearly twice the time where both come from memory.
template <class V>
RENORM_INLINE void loaded([[maybe_unused]] V& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
}

template <class A>
RENORM_INLINE Vector<A> broadcast(A value) { return value - Vector<A>{}; }

template <class A>
RENORM_INLINE Mask<A> lane_numbers() {
  Mask<A> lanes;
  for (int64_t i = 0; i < kLanes<A>; ++i) lanes[i] = i;
  return lanes;
}

// Loads and stores, with conversion of half precision.

template <class A>
RENORM_INLINE Vector<A> load(const A* from) {
  Vector<A> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
template <class A>
RENORM_INLINE void store(A* to, Vector<A> value) { __builtin_memcpy(to, &value, sizeof(value)); }

RENORM_INLINE Vector<float> load(const BFloat16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return (Vector<float>)(__builtin_convertvector(halves, Words) << 16);
}
RENORM_INLINE void store(BFloat16* to, Vector<float> value) {
  const Words words = (Words)value;
  const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;  // to nearest, ties to even
  const Halves halves = __builtin_convertvector(value == value ? rounded : Words{} + 0x7fc0, Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

#if RENORM_VECTOR_BYTES == 64
RENORM_INLINE Vector<float> load(const Float16* from) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
RENORM_INLINE void store(Float16* to, Vector<float> value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}
#elif RENORM_VECTOR_BYTES == 32
RENORM_INLINE Vector<float> load(const Float16* from) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
RENORM_INLINE void store(Float16* to, Vector<float> value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}
#else
// The float whose exponent is off by 112 is scaled right by a multiplication, subnormal numbers included.
RENORM_INLINE Vector<float> load(const Float16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words);
  const Words magnitude = (words & 0x7fff) << 13;
  const Vector<float> scaled = (Vector<float>)magnitude * 0x1p112f;
  const Words special = magnitude | 0x7f800000;  // infinite or not a number
  const Words bits = (words & 0x7c00) == 0x7c00 ? special : (Words)scaled;
  return (Vector<float>)(bits | ((words & 0x8000) << 16));
}
// Adding a magic number rounds to the subnormal grid; normal numbers round as bfloat16 does, 13 bits off.
RENORM_INLINE void store(Float16* to, Vector<float> value) {
  const Words words = (Words)value, sign = (words >> 16) & 0x8000, magnitude = words & 0x7fffffff;
  const Words subnormal = (Words)((Vector<float>)magnitude + 0.5f) - 0x3f000000;
  const Words normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Words infinite = magnitude > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words finite = magnitude < 0x38800000 ? subnormal : normal;
  const Words bits = (magnitude >= 0x477ff000 ? infinite : finite) | sign;
  const Halves halves = __builtin_convertvector(bits, Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}
#endif

template <class T>
RENORM_INLINE Accumulation<T> value_of(T element) {
  if constexpr (sizeof(T) == sizeof(Accumulation<T>)) {
    return element;
  } else {
    const T padded[kLanes<float>] = {element};
    return load(padded)[0];
  }
}

// Stores that pass the cache by, for what is too large to be found there later. The address must be aligned.
#if RENORM_VECTOR_BYTES == 64
RENORM_INLINE void stream(float* to, Vector<float> value) { _mm512_stream_ps(to, (__m512)value); }
RENORM_INLINE void stream(double* to, Vector<double> value) { _mm512_stream_pd(to, (__m512d)value); }
#elif RENORM_VECTOR_BYTES == 32
RENORM_INLINE void stream(float* to, Vector<float> value) { _mm256_stream_ps(to, (__m256)value); }
RENORM_INLINE void stream(double* to, Vector<double> value) { _mm256_stream_pd(to, (__m256d)value); }
#endif
template <class T, class V>
RENORM_INLINE void stream(T* to, V value) { store(to, value); }

template <class T>
RENORM_INLINE void load_bytes(const uint8_t* from, Mask<T>& mask) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  mask = __builtin_convertvector(bytes, Mask<T>) != 0;
}

// How a run of elements ends. Each kind loads, stores and drops the lanes that are none of its own.

template <class A>
struct Whole {
  template <class T> RENORM_INLINE Vector<A> load(const T* from) const { return RENORM_ISA::load(from); }
  template <class T> RENORM_INLINE void store(T* to, Vector<A> value) const { RENORM_ISA::store(to, value); }
  template <class T> RENORM_INLINE void store(T* to, Vector<A> value, bool past_cache) const {
    past_cache ? RENORM_ISA::stream(to, value) : RENORM_ISA::store(to, value);
  }
  RENORM_INLINE Mask<A> load_mask(const uint8_t* from) const {
    Mask<A> mask;
    load_bytes<A>(from, mask);
    return mask;
  }
  RENORM_INLINE Vector<A> own(Vector<A> value) const { return value; }
};

// A full vector at the beginning or the end of a run that shares lanes with its neighbour: lanes [from, to) are its own.
template <class A>
struct Overlapping : Whole<A> {
  Mask<A> fresh;
  RENORM_INLINE Overlapping(int64_t from, int64_t to)
      : fresh((lane_numbers<A>() >= Mask<A>{} + Lane<A>(from)) & (lane_numbers<A>() < Mask<A>{} + Lane<A>(to))) {}
  RENORM_INLINE Vector<A> own(Vector<A> value) const { return fresh ? value : Vector<A>{}; }
};

// A run shorter than a vector.
template <class A>
struct Partial {
  int64_t count;
  template <class T> RENORM_INLINE Vector<A> load(const T* from) const {
    T padded[kLanes<A>] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
    return RENORM_ISA::load(padded);
  }
  template <class T> RENORM_INLINE void store(T* to, Vector<A> value, bool = false) const {
    T padded[kLanes<A>];
    RENORM_ISA::store(padded, value);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
  }
  RENORM_INLINE Mask<A> load_mask(const uint8_t* from) const {
    Mask<A> mask{};
    for (int64_t i = 0; i < count; ++i) mask[i] = -(from[i] != 0);
    return mask;
  }
  RENORM_INLINE Vector<A> own(Vector<A> value) const {
    return lane_numbers<A>() < Mask<A>{} + Lane<A>(count) ? value : Vector<A>{};
  }
};

// How many elements a run that begins at offset `at` has before the next whole vector of its tensor: what is aligned is
// read and written a cache line at a time. In short runs that saves nothing.
template <class A>
RENORM_INLINE int64_t before_aligned(int64_t at, int64_t length) {
  constexpr int64_t kShort = 64;
  return length < kShort ? 0 : -at & (kLanes<A> - 1);
}

// Calls body(i, lanes) for every vector of a run of `length` elements, of which `head` come before what is aligned.
template <class A, class F>
RENORM_INLINE void for_run(int64_t length, int64_t head, F&& body) {
  if (length < kLanes<A>) {
    if (length > 0) body(0, Partial<A>{length});
    return;
  }
  int64_t i = head;
  for (; i + kLanes<A> <= length; i += kLanes<A>) body(i, Whole<A>{});
  const int64_t tail = length - i;
  for (int64_t end = head > 0 ? 0 : 1; end < (tail > 0 ? 2 : 1); ++end)  // of both, so that body is compiled once
    body(end * (length - kLanes<A>), end == 0 ? Overlapping<A>(0, head) : Overlapping<A>(kLanes<A> - tail, kLanes<A>));
}

// The same with two sets of N sums, since one set would wait for its own additions: body(i, lanes, sums).
template <int N, class A, class F>
RENORM_INLINE void reduce_run(int64_t length, int64_t head, Vector<A> (&sums)[2][N], F&& body) {
  if (length < kLanes<A>) {
    if (length > 0) body(0, Partial<A>{length}, sums[0]);
    return;
  }
  int64_t i = head;
  for (; i + 2 * kLanes<A> <= length; i += 2 * kLanes<A>) {
    body(i, Whole<A>{}, sums[0]);
    body(i + kLanes<A>, Whole<A>{}, sums[1]);
  }
  // What is left are at most a head, a whole vector and a tail.
  if (head > 0) body(0, Overlapping<A>(0, head), sums[0]);
  for (int64_t rest = length - i; rest > 0; rest = length - i) {
    const int64_t own = rest < kLanes<A> ? rest : kLanes<A>;
    i += own;
    body(i - kLanes<A>, Overlapping<A>(kLanes<A> - own, kLanes<A>), sums[1]);
  }
}

// The sums of neighbouring lanes: of a, then of b.
RENORM_INLINE Vector<double> add_neighbours(Vector<double> a, Vector<double> b) {
  const Mask<double> even = 2 * lane_numbers<double>();
#if defined(__clang__)  // which shuffles by constants alone
  constexpr int64_t half = kLanes<double> / 2;
  Vector<double> sum;
  for (int64_t i = 0; i < half; ++i) {
    sum[i] = a[2 * i] + a[2 * i + 1];
    sum[half + i] = b[2 * i] + b[2 * i + 1];
  }
  return sum;
#else
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

// The lanes of a vector in double, added up to half as many where they were single.
RENORM_INLINE Vector<double> widened(const Vector<double>& value) { return value; }
RENORM_INLINE Vector<double> widened(const Vector<float>& value) {
  typedef float Half __attribute__((vector_size(RENORM_VECTOR_BYTES / 2)));
  Half halves[2];
  __builtin_memcpy(halves, &value, sizeof(value));
  return __builtin_convertvector(halves[0], Vector<double>) + __builtin_convertvector(halves[1], Vector<double>);
}

// sums[c] = the sum of the lanes of vectors[c][which], a vector of sums at a time.
template <class A, int STRIDE>
__attribute__((noinline)) void sum_lanes(const Vector<A> (*vectors)[STRIDE], int which, int64_t count, double* sums) {
  constexpr int64_t kMany = kLanes<double>;
  for (int64_t c = 0; c < count; c += kMany) {
    Vector<double> level[kMany];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kMany; ++i) level[i] = c + i < count ? widened(vectors[c + i][which]) : Vector<double>{};
#pragma GCC unroll 3
    for (int64_t width = kMany / 2; width > 0; width /= 2)
#pragma GCC unroll 4
      for (int64_t i = 0; i < width; ++i) level[i] = add_neighbours(level[2 * i], level[2 * i + 1]);
    for (int64_t i = 0; i < kMany && c + i < count; ++i) sums[c + i] = level[0][i];
  }
}

// Memory for a call; not std::vector, whose code one instruction set would compile for all.
template <class T>
struct Buffer {
  T* data;
  // One byte more, since of none there may be no address.
  explicit Buffer(int64_t size) : data(static_cast<T*>(__builtin_malloc(size * sizeof(T) + 1))) {
    if (!data) __builtin_trap();
  }
  ~Buffer() { __builtin_free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace RENORM_ISA
}  // namespace renorm
