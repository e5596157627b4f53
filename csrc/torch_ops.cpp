// The operations as torch sees them. Through the stable ABI alone, so that one build serves every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "entry.h"
#include "tracking.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using renorm::named;
using renorm::torch_threads;

template <class T> constexpr ScalarType kType = ScalarType::Float;
template <> constexpr ScalarType kType<double> = ScalarType::Double;

bool past_cache(const Tensor& x) { return x.numel() * int64_t(x.element_size()) > renorm::kPastCacheBytes; }

// Whether memory holds x densely in the given order of dimensions; the strides of a size of 1 do not matter.
bool is_dense(const Tensor& x, bool channels_last) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t rank = x.dim();
  int64_t step = 1;
  const auto next = [&](int64_t dim) {
    if (sizes[dim] != 1 && strides[dim] != step) return false;
    step *= sizes[dim];
    return true;
  };
  if (channels_last && !next(1)) return false;
  for (int64_t dim = rank - 1; dim > 1; --dim)
    if (!next(dim)) return false;
  return (channels_last || next(1)) && next(0);
}

struct Dense {
  Tensor tensor;
  bool channels_last;
};

// x itself, or a contiguous copy. Without positions, (N, C), both layouts are the same, and columns the better view.
Dense dense(const Tensor& x) {
  if (is_dense(x, true)) return {x, true};
  if (is_dense(x, false)) return {x, false};
  const Tensor copy = torch::stable::contiguous(x);
  return {copy, is_dense(copy, true)};
}

// The kernels trust sizes: a wrong one would be memory that is not there.
void check_elements(const char* name, const Tensor& tensor, int64_t elements) {
  STD_TORCH_CHECK(tensor.numel() == elements, name, " must have ", elements, " elements, got ", tensor.numel());
}

// The tensor in the memory layout of `like`.
Tensor laid_out_as(const Dense& like, const Tensor& tensor) {
  check_elements("a tensor shaped like x", tensor, like.tensor.numel());
  if (is_dense(tensor, like.channels_last)) return tensor;
  Tensor copy = torch::stable::empty_like(like.tensor);
  return torch::stable::copy_(copy, tensor);
}

renorm::Shape shape_of(const Dense& x, std::optional<int64_t> examples_per_group, int64_t channels_per_group) {
  const auto sizes = x.tensor.sizes();
  STD_TORCH_CHECK(channels_per_group > 0 && sizes[1] % channels_per_group == 0,
                  "channels_per_group must divide the ", sizes[1], " channels, got ", channels_per_group);
  STD_TORCH_CHECK(examples_per_group.value_or(1) > 0, "examples_per_group must be positive");
  STD_TORCH_CHECK(x.tensor.numel() > 0, "x must have elements");
  int64_t positions = 1;
  for (int64_t dim = 2; dim < x.tensor.dim(); ++dim) positions *= sizes[dim];
  return {sizes[0], sizes[1], positions, x.channels_last, examples_per_group.value_or(sizes[0]), channels_per_group};
}

// Per-channel numbers as the kernels want them, kept alive by this object.
template <class A>
class Numbers {
 public:
  Numbers(const char* name, const Optional& tensor, int64_t elements) {
    if (!tensor) return;
    check_elements(name, *tensor, elements);
    tensor_ = tensor->scalar_type() == kType<A> ? *tensor : torch::stable::to(*tensor, kType<A>);
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
    data_ = static_cast<const A*>(tensor_->const_data_ptr());
  }
  const A* data() const { return data_; }

 private:
  Optional tensor_;
  const A* data_ = nullptr;
};

// The mask's bytes in order, one per example and position.
Optional bytes_of(const Optional& mask, const renorm::Shape& shape) {
  if (!mask) return std::nullopt;
  check_elements("mask", *mask, shape.examples * shape.positions);
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be a bool tensor");
  return torch::stable::contiguous(*mask);
}

double number(const char* name, const Optional& tensor, double otherwise) {
  if (!tensor) return otherwise;
  check_elements(name, *tensor, 1);
  if (tensor->scalar_type() == ScalarType::Double) return *static_cast<const double*>(tensor->const_data_ptr());
  if (tensor->scalar_type() == ScalarType::Float) return *static_cast<const float*>(tensor->const_data_ptr());
  return *static_cast<const double*>(torch::stable::to(*tensor, ScalarType::Double).const_data_ptr());
}

template <class T>
const T* data_of(const Optional& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* mutable_data_of(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

template <class F>
auto with_element(ScalarType type, F&& body) {
  switch (type) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(renorm::BFloat16{});
    case ScalarType::Half: return body(renorm::Float16{});
    default: STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
}

// Through the shim, since the stable functions look their operation up by name, which takes longer than a small layer.
Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t rank, ScalarType type) {
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, static_cast<int32_t>(type),
                                                  aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t strides[4], step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
  return empty(sizes.begin(), strides, sizes.size(), type);
}

Tensor empty_like(const Dense& x) {
  return empty(x.tensor.sizes().data(), x.tensor.strides().data(), x.tensor.dim(), x.tensor.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_within(
    const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mask, const Optional& residual,
    const Optional& running_mean, const Optional& running_var, double r_max, double d_max,
    const Optional& r, const Optional& d, std::optional<int64_t> examples_per_group, int64_t channels_per_group,
    double eps, const std::string& act) {
  return with_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = renorm::Accumulation<T>;
    const Dense input = dense(x);
    const renorm::Shape shape = shape_of(input, examples_per_group, channels_per_group);
    const int64_t groups = shape.groups(), channels = shape.channels;
    const Numbers<A> weights("weight", weight, channels), biases("bias", bias, channels);
    const Numbers<A> means("running_mean", running_mean, channels), vars("running_var", running_var, channels);
    const Numbers<A> rs("r", r, groups * shape.channel_groups()), ds("d", d, groups * shape.channel_groups());
    const Optional added = residual ? Optional(laid_out_as(input, *residual)) : std::nullopt;
    const Optional counted = bytes_of(mask, shape);
    const Tensor mean = empty({groups, channels}, kType<A>), var = empty({groups, channels}, kType<A>);
    const Tensor count = empty({groups, 1}, kType<A>);
    const Tensor coefficients = empty({renorm::Coefficients<A>::rows, groups, channels}, kType<A>);
    const Tensor y = empty_like(input);
    const renorm::Source source = rs.data()      ? renorm::Source::given
                                  : means.data() ? renorm::Source::renorm
                                                 : renorm::Source::batch;
    renorm::run(renorm::Forward<T>{
        torch_threads(), shape, named<renorm::Act>("act", renorm::kActNames, act), past_cache(x),
        {source, weights.data(), biases.data(), means.data(), vars.data(), rs.data(), ds.data(), r_max,
         d_max, 0, eps},
        static_cast<const T*>(input.tensor.const_data_ptr()), data_of<T>(added), data_of<uint8_t>(counted),
        mutable_data_of<T>(y), mutable_data_of<A>(mean), mutable_data_of<A>(var), mutable_data_of<A>(count),
        {mutable_data_of<A>(coefficients), groups * channels}});
    return std::make_tuple(y, mean, var, count, coefficients);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mask, const Optional& residual,
    const Optional& running_mean, const Optional& running_var, const Optional& r_max, const Optional& d_max,
    const Optional& r, const Optional& d, std::optional<int64_t> examples_per_group, int64_t channels_per_group,
    double eps, std::string act) {
  return normalize_within(x, weight, bias, mask, residual, running_mean, running_var, number("r_max", r_max, 1),
                          number("d_max", d_max, 0), r, d, examples_per_group, channels_per_group, eps, act);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& mask, const Optional& residual,
    const Optional& y, const Tensor& count, const Tensor& coefficients, std::optional<int64_t> examples_per_group,
    int64_t channels_per_group, std::string act, bool wants_residual) {
  return with_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = renorm::Accumulation<T>;
    const Dense input = dense(x);
    const renorm::Shape shape = shape_of(input, examples_per_group, channels_per_group);
    const Numbers<A> weights("weight", weight, shape.channels);
    check_elements("count", count, shape.groups());
    check_elements("coefficients", coefficients, renorm::Coefficients<A>::rows * shape.groups() * shape.channels);
    const Tensor gradient = laid_out_as(input, dy);
    const Optional added = residual ? Optional(laid_out_as(input, *residual)) : std::nullopt;
    const Optional output = y ? Optional(laid_out_as(input, *y)) : std::nullopt;
    const Optional counted = bytes_of(mask, shape);
    const Tensor dx = empty_like(input);
    const Tensor dresidual = wants_residual ? empty_like(input) : empty({0}, x.scalar_type());
    const Tensor dweight = empty({shape.channels}, kType<A>), dbias = empty({shape.channels}, kType<A>);
    renorm::run(renorm::Backward<T>{
        torch_threads(), shape, named<renorm::Act>("act", renorm::kActNames, act), past_cache(x), weights.data(),
        static_cast<const A*>(count.const_data_ptr()),
        static_cast<const T*>(gradient.const_data_ptr()), static_cast<const T*>(input.tensor.const_data_ptr()),
        data_of<T>(added), data_of<T>(output), data_of<uint8_t>(counted), mutable_data_of<T>(dx),
        wants_residual ? mutable_data_of<T>(dresidual) : nullptr, mutable_data_of<A>(dweight),
        mutable_data_of<A>(dbias),
        {static_cast<A*>(const_cast<void*>(coefficients.const_data_ptr())), shape.groups() * shape.channels}});
    return std::make_tuple(dx, dweight, dbias, dresidual);
  });
}

Tensor evaluate(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& mask,
                const Optional& residual, const Tensor& running_mean, const Tensor& running_var, double example_weight,
                int64_t channels_per_group, double eps, std::string act) {
  return with_element(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = renorm::Accumulation<T>;
    const Dense input = dense(x);
    const bool weighed = example_weight > 0;
    const renorm::Shape shape = shape_of(input, weighed ? 1 : x.size(0), channels_per_group);
    const Numbers<A> weights("weight", weight, shape.channels), biases("bias", bias, shape.channels);
    const Numbers<A> means("running_mean", running_mean, shape.channels);
    const Numbers<A> vars("running_var", running_var, shape.channels);
    const Optional added = residual ? Optional(laid_out_as(input, *residual)) : std::nullopt;
    const Optional counted = bytes_of(mask, shape);
    const Tensor y = empty_like(input);
    std::vector<A> coefficients(renorm::Coefficients<A>::rows * shape.groups() * shape.channels);
    renorm::run(renorm::Forward<T>{
        torch_threads(), shape, named<renorm::Act>("act", renorm::kActNames, act), past_cache(x),
        {weighed ? renorm::Source::weighed : renorm::Source::running, weights.data(), biases.data(), means.data(),
         vars.data(), nullptr, nullptr, 1, 0, example_weight, eps},
        static_cast<const T*>(input.tensor.const_data_ptr()), data_of<T>(added), data_of<uint8_t>(counted),
        mutable_data_of<T>(y), nullptr, nullptr, nullptr, {coefficients.data(), shape.groups() * shape.channels}});
    return y;
  });
}

void check_counter(const char* name, const Tensor& counter) {
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long, name, " must be int64");
}

template <class A>
void track_as(const Tensor& running_mean, const Tensor& running_var, const Tensor& steps, const Tensor& skipped,
              const Tensor& mean, const Tensor& var, const Tensor& count, const std::string& tracking, double momentum,
              int64_t channels_per_group, double eps) {
  const int64_t groups = mean.size(0), channels = mean.size(1);
  const Numbers<A> means("mean", mean, groups * channels), vars("var", var, groups * channels);
  const Numbers<A> counts("count", count, groups);
  check_elements("running_mean", running_mean, channels);
  check_elements("running_var", running_var, channels);
  check_counter("steps", steps);
  check_counter("skipped", skipped);
  renorm::track<A>(
      {mutable_data_of<A>(running_mean), mutable_data_of<A>(running_var), mutable_data_of<int64_t>(steps),
       mutable_data_of<int64_t>(skipped)},
      {means.data(), vars.data(), counts.data(), groups, channels},
      named<renorm::Tracking>("tracking", renorm::kTrackingNames, tracking), momentum, channels_per_group, eps);
}

void track(Tensor running_mean, Tensor running_var, Tensor steps, Tensor skipped, const Tensor& mean, const Tensor& var,
           const Tensor& count, std::string tracking, std::optional<double> momentum, int64_t channels_per_group,
           double eps) {
  const auto run = running_mean.scalar_type() == ScalarType::Double ? track_as<double> : track_as<float>;
  run(running_mean, running_var, steps, skipped, mean, var, count, tracking, momentum.value_or(-1), channels_per_group,
      eps);
}

std::string instruction_set() {
  switch (renorm::instruction_set()) {
    case renorm::InstructionSet::avx512: return "avx512";
    case renorm::InstructionSet::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace

// ops/schema.py defines the others.
STABLE_TORCH_LIBRARY_FRAGMENT(renorm, m) {
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(renorm, CPU, m) {
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_eager", TORCH_BOX(&normalize));
  m.impl("normalize_backward", TORCH_BOX(&normalize_backward));
  m.impl("evaluate", TORCH_BOX(&evaluate));
  m.impl("track", TORCH_BOX(&track));
}

STABLE_TORCH_LIBRARY_IMPL(renorm, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
