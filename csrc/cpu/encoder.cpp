// add_norm, add_norm_back, gelu and gelu_back on the CPU: what stands between the matrix products
// of a vision transformer, one pass over memory each.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/sums.h"

namespace scc_fast {
namespace {

constexpr int64_t kGrain = 16384;  // elements that a thread takes at least

bool is_number(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

// ---- Rows of the residual stream ----------------------------------------------------------------

struct Stream {
  int64_t width, rows;
  Tensor tensor;  // [..., W] float32, contiguous

  int64_t grain() const { return 1 + kGrain / width; }
};

Stream read_stream(const char* op, const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float && x.is_cpu(), op,
        "the residual stream must be a float32 CPU tensor");
  check(x.dim() >= 1 && x.size(-1) >= 1, op, "the residual stream must be (..., W) with W >= 1");
  return {x.size(-1), x.numel() / x.size(-1), torch::stable::contiguous(x)};
}

// Of the stream's shape, in one of the three formats.
Tensor read_like(const char* op, const char* rule, const Tensor& tensor, const Stream& stream) {
  check(tensor.is_cpu() && is_number(tensor.scalar_type()) &&
            tensor.sizes().equals(stream.tensor.sizes()),
        op, rule);
  return torch::stable::contiguous(tensor);
}

// float32 of `dim` dimensions and `count` numbers.
Tensor read_floats(const char* op, const char* rule, const Tensor& tensor, int64_t dim,
                   int64_t count) {
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == dim &&
            tensor.numel() == count,
        op, rule);
  return torch::stable::contiguous(tensor);
}

std::vector<int64_t> leading(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

// ---- Sum and norm -------------------------------------------------------------------------------

struct AddNormJob {
  int64_t width;
  const float* x;
  const void* y;  // or null
  ScalarType y_type;
  const float *weight, *bias;  // [W]
  float epsilon;
  float* total;  // null without y
  void* normed;
  float *mean, *scale;  // one a row

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const float count = static_cast<float>(width);
    for (int64_t i = begin; i < end; ++i) {
      if (y) {
        y_type == ScalarType::Float  ? add<Float32>(i)
        : y_type == ScalarType::Half ? add<Float16>(i)
                                     : add<BFloat16>(i);
      }
      const float* SCC_RESTRICT row = (y ? total : x) + i * width;
      // The sum's rounding is taken off the mean, so that a great offset costs no accuracy.
      const float guess = sum_of(row, width) / count;
      const Sums off = sums_of<true>(nullptr, row, guess, width);
      const float by = off.plain / count, middle = guess + by;
      const float variance = off.product / count - by * by;
      const float factor = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + epsilon);
      auto* SCC_RESTRICT to = row_of<Number>(normed, i, width);
      for (int64_t k = 0; k < width; ++k) {
        to[k] = Number::store((row[k] - middle) * factor * weight[k] + bias[k]);
      }
      mean[i] = middle;
      scale[i] = factor;
    }
  }

  // total = x + y in one row.
  template <class Number>
  SCC_INLINE void add(int64_t i) const {
    const float* SCC_RESTRICT from = x + i * width;
    const auto* SCC_RESTRICT more = row_of<Number>(y, i, width);
    float* SCC_RESTRICT to = total + i * width;
    for (int64_t k = 0; k < width; ++k) to[k] = from[k] + Number::load(more[k]);
  }
};

SCC_DEFINE_RUN(AddNormJob)

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm(const Tensor& x,                 // [..., W]
                                                    const std::optional<Tensor>& y,  // like x
                                                    const Tensor& weight,            // [W]
                                                    const Tensor& bias,              // [W]
                                                    double epsilon, ScalarType dtype) {
  const char* op = "add_norm";
  const Stream stream = read_stream(op, x);
  const Tensor by = read_floats(op, "weight must be (W,) float32", weight, 1, stream.width);
  const Tensor plus = read_floats(op, "bias must be (W,) float32", bias, 1, stream.width);
  check_not_negative(op, "epsilon must be a finite number >= 0", {epsilon});
  check(is_number(dtype), op, "dtype must be float32, float16 or bfloat16");
  std::optional<Tensor> more;
  if (y) more = read_like(op, "y must have the shape and device of x", *y, stream);
  Tensor total = y ? torch::stable::new_empty(x, x.sizes(), ScalarType::Float)
                   : torch::stable::new_empty(x, {0}, ScalarType::Float);
  Tensor normed = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor mean = torch::stable::new_empty(x, leading(x), ScalarType::Float);
  Tensor scale = torch::stable::new_empty(x, leading(x), ScalarType::Float);
  const AddNormJob job{stream.width,
                       floats(stream.tensor),
                       more ? more->const_data_ptr() : nullptr,
                       more ? more->scalar_type() : ScalarType::Float,
                       floats(by),
                       floats(plus),
                       static_cast<float>(epsilon),
                       floats(total),
                       normed.mutable_data_ptr(),
                       floats(mean),
                       floats(scale)};
  if (stream.rows) run(job, dtype, stream.rows, stream.grain());
  return {total, normed, mean, scale};
}

struct AddNormBackJob {
  int64_t width;
  const void* gradient;
  const float *total, *mean, *scale, *weight;
  const float* residual;  // or null
  float* whole;
  void* low;  // null where float32
  ScalarType low_type;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const float count = static_cast<float>(width);
    for (int64_t i = begin; i < end; ++i) {
      const auto* SCC_RESTRICT from = row_of<Number>(gradient, i, width);
      const float* SCC_RESTRICT row = total + i * width;
      const float middle = mean[i], factor = scale[i];
      float* SCC_RESTRICT to = whole + i * width;
      for (int64_t k = 0; k < width; ++k) to[k] = Number::load(from[k]) * weight[k];
      const Sums sums = sums_of<false>(to, row, middle, width);
      const float level = sums.plain / count, slope = sums.product * factor / count;
      if (residual) {
        const float* SCC_RESTRICT more = residual + i * width;
        for (int64_t k = 0; k < width; ++k) {
          to[k] = factor * (to[k] - level - (row[k] - middle) * factor * slope) + more[k];
        }
      } else {
        for (int64_t k = 0; k < width; ++k) {
          to[k] = factor * (to[k] - level - (row[k] - middle) * factor * slope);
        }
      }
      if (!low) continue;
      low_type == ScalarType::Half ? narrow<Float16>(i) : narrow<BFloat16>(i);
    }
  }

  template <class Number>
  SCC_INLINE void narrow(int64_t i) const {
    const float* SCC_RESTRICT from = whole + i * width;
    auto* SCC_RESTRICT to = row_of<Number>(low, i, width);
    for (int64_t k = 0; k < width; ++k) to[k] = Number::store(from[k]);
  }
};

SCC_DEFINE_RUN(AddNormBackJob)

std::tuple<Tensor, Tensor> add_norm_back(const Tensor& gradient,                 // [..., W]
                                         const Tensor& total,                    // [..., W]
                                         const Tensor& mean,                     // [...]
                                         const Tensor& scale,                    // [...]
                                         const Tensor& weight,                   // [W]
                                         const std::optional<Tensor>& residual,  // like total
                                         ScalarType dtype) {
  const char* op = "add_norm_back";
  const Stream stream = read_stream(op, total);
  const Tensor from =
      read_like(op, "gradient must have the shape and device of total", gradient, stream);
  const int64_t dim = total.dim() - 1;
  const Tensor middle = read_floats(op, "mean must be one float32 a row", mean, dim, stream.rows);
  const Tensor factor = read_floats(op, "scale must be one float32 a row", scale, dim, stream.rows);
  const Tensor by = read_floats(op, "weight must be (W,) float32", weight, 1, stream.width);
  check(is_number(dtype), op, "dtype must be float32, float16 or bfloat16");
  std::optional<Tensor> more;
  if (residual) {
    check(residual->scalar_type() == ScalarType::Float, op, "residual must be float32");
    more = read_like(op, "residual must have the shape and device of total", *residual, stream);
  }
  const bool narrow = dtype != ScalarType::Float;
  Tensor whole = torch::stable::new_empty(total, total.sizes(), ScalarType::Float);
  Tensor low = narrow ? torch::stable::new_empty(total, total.sizes(), dtype)
                      : torch::stable::new_empty(total, {0}, dtype);
  const AddNormBackJob job{stream.width,
                           from.const_data_ptr(),
                           floats(stream.tensor),
                           floats(middle),
                           floats(factor),
                           floats(by),
                           more ? floats(std::as_const(*more)) : nullptr,
                           floats(whole),
                           narrow ? low.mutable_data_ptr() : nullptr,
                           dtype};
  if (stream.rows) run(job, from.scalar_type(), stream.rows, stream.grain());
  return {whole, low};
}

// ---- Activation ---------------------------------------------------------------------------------

enum class Kind { kQuick, kErf, kTanh };

// x + bias, cut into rows as wide as the bias; without one, into pieces.
struct Activated {
  Kind kind;
  int64_t numel, width;
  Tensor tensor;            // contiguous
  std::vector<float> bias;  // [W], or empty

  int64_t rows() const { return (numel + width - 1) / width; }
  int64_t grain() const { return 1 + kGrain / width; }
};

Kind read_kind(const char* op, const std::string& kind) {
  check(kind == "quick" || kind == "erf" || kind == "tanh", op, "kind must be quick, erf or tanh");
  return kind == "quick" ? Kind::kQuick : kind == "erf" ? Kind::kErf : Kind::kTanh;
}

template <class Number>
void widen(const Tensor& from, std::vector<float>& to) {
  const auto* values = static_cast<const typename Number::Stored*>(from.const_data_ptr());
  for (size_t k = 0; k < to.size(); ++k) to[k] = Number::load(values[k]);
}

Activated read_activated(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
                         const std::string& kind) {
  check(x.is_cpu() && is_number(x.scalar_type()), op,
        "x must be a CPU tensor of float32, float16 or bfloat16");
  Activated read{read_kind(op, kind), x.numel(), 4096, torch::stable::contiguous(x), {}};
  if (!bias) return read;
  const ScalarType type = bias->scalar_type();
  check(bias->is_cpu() && (type == ScalarType::Float || type == x.scalar_type()), op,
        "bias must be a CPU tensor of float32 or in the dtype of x");
  check(x.dim() >= 1 && bias->dim() == 1 && bias->size(0) == x.size(-1), op, "bias must be (W,)");
  read.width = std::max<int64_t>(1, x.size(-1));
  read.bias.resize(bias->numel());
  const Tensor whole = torch::stable::contiguous(*bias);
  type == ScalarType::Float  ? widen<Float32>(whole, read.bias)
  : type == ScalarType::Half ? widen<Float16>(whole, read.bias)
                             : widen<BFloat16>(whole, read.bias);
  return read;
}

struct GeluJob {
  const Activated& read;
  const float* bias;  // or null
  const void* x;
  void* y;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    if (read.kind == Kind::kQuick) return each<Number, QuickGelu>(begin, end);
    if (read.kind == Kind::kErf) return each<Number, ErfGelu>(begin, end);
    each<Number, TanhGelu>(begin, end);
  }

  template <class Number, class Gelu>
  SCC_INLINE void each(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = std::min(read.width, read.numel - i * read.width);
      const auto* SCC_RESTRICT from = row_of<Number>(x, i, read.width);
      auto* SCC_RESTRICT to = row_of<Number>(y, i, read.width);
      if (bias) {
        for (int64_t k = 0; k < count; ++k) {
          to[k] = Number::store(Gelu::value(Number::load(from[k]) + bias[k]));
        }
      } else {
        for (int64_t k = 0; k < count; ++k) {
          to[k] = Number::store(Gelu::value(Number::load(from[k])));
        }
      }
    }
  }
};

SCC_DEFINE_RUN(GeluJob)

struct GeluBackJob {
  const Activated& read;
  const float* bias;  // or null
  const void* gradient;
  const void* x;
  void* out;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    if (read.kind == Kind::kQuick) return each<Number, QuickGelu>(begin, end);
    if (read.kind == Kind::kErf) return each<Number, ErfGelu>(begin, end);
    each<Number, TanhGelu>(begin, end);
  }

  template <class Number, class Gelu>
  SCC_INLINE void each(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = std::min(read.width, read.numel - i * read.width);
      const auto* SCC_RESTRICT slope = row_of<Number>(gradient, i, read.width);
      const auto* SCC_RESTRICT from = row_of<Number>(x, i, read.width);
      auto* SCC_RESTRICT to = row_of<Number>(out, i, read.width);
      if (bias) {
        for (int64_t k = 0; k < count; ++k) {
          const float by = Gelu::slope(Number::load(from[k]) + bias[k]);
          to[k] = Number::store(Number::load(slope[k]) * by);
        }
      } else {
        for (int64_t k = 0; k < count; ++k) {
          const float by = Gelu::slope(Number::load(from[k]));
          to[k] = Number::store(Number::load(slope[k]) * by);
        }
      }
    }
  }
};

SCC_DEFINE_RUN(GeluBackJob)

Tensor gelu(const Tensor& x,                    // any shape
            const std::optional<Tensor>& bias,  // [W]
            const std::string& kind) {
  const Activated read = read_activated("gelu", x, bias, kind);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  const GeluJob job{read, bias ? read.bias.data() : nullptr, read.tensor.const_data_ptr(),
                    y.mutable_data_ptr()};
  if (read.numel) run(job, x.scalar_type(), read.rows(), read.grain());
  return y;
}

Tensor gelu_back(const Tensor& gradient,             // like x
                 const Tensor& x,                    // any shape
                 const std::optional<Tensor>& bias,  // [W]
                 const std::string& kind) {
  const char* op = "gelu_back";
  const Activated read = read_activated(op, x, bias, kind);
  check(gradient.is_cpu() && gradient.scalar_type() == x.scalar_type() &&
            gradient.sizes().equals(x.sizes()),
        op, "gradient must have the dtype, shape and device of x");
  const Tensor slope = torch::stable::contiguous(gradient);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const GeluBackJob job{read, bias ? read.bias.data() : nullptr, slope.const_data_ptr(),
                        read.tensor.const_data_ptr(), out.mutable_data_ptr()};
  if (read.numel) run(job, x.scalar_type(), read.rows(), read.grain());
  return out;
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&scc_fast::add_norm));
  m.impl("add_norm_back", TORCH_BOX(&scc_fast::add_norm_back));
  m.impl("gelu", TORCH_BOX(&scc_fast::gelu));
  m.impl("gelu_back", TORCH_BOX(&scc_fast::gelu_back));
}
