// drift_head, pseudo_label, margin_head, mean_logits, view_weights on CUDA.
//
// Products are cuBLAS's, through the dispatcher; what surrounds them is fused.
#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/heads.cuh"
#include "tensor.h"

namespace scc_fast {
namespace {

constexpr int64_t kScratch = int64_t{16} << 20;  // bytes of dot products at a time

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

bool fits(const Tensor& tensor, const Tensor& features, ScalarType dtype,
          torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return tensor.is_cuda() && tensor.get_device_index() == features.get_device_index() &&
         tensor.scalar_type() == dtype && tensor.sizes().equals(shape);
}

Shape shape_of(const char* op, const Tensor& features) {
  const ScalarType dtype = features.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        op, "features must be float32, float16 or bfloat16");
  check(features.is_cuda(), op, "features must be on the GPU");
  check(features.dim() == 3 && features.size(0) >= 1 && features.size(2) >= 1, op,
        "features must be (L, B, D) with L and D >= 1");
  check(features.size(0) <= kMaxRows, op, "features must be of at most 128 views");
  check(features.size(1) <= INT_MAX, op, "features must be of fewer than 2^31 images");
  return {static_cast<int>(features.size(0)), 0, features.size(1), features.size(2)};
}

Shape shape_of(const char* op, const Tensor& features, const Tensor& text) {
  Shape shape = shape_of(op, features);
  check(text.dim() == 2 && text.size(0) >= 1 && text.size(0) < INT_MAX &&
            fits(text, features, ScalarType::Float, {text.size(0), shape.width}),
        op, "text must be (U, D) float32 with U >= 1, on the device of features");
  shape.classes = static_cast<int>(text.size(0));
  return shape;
}

void check_count(const char* op, const std::optional<Tensor>& count, const Tensor& features,
                 const Shape& shape) {
  check(!count || fits(*count, features, ScalarType::Long, {shape.classes}), op,
        "count must be (U,) int64 on the device of features");
}

// Contiguous and out of autograd's sight, which would refuse a product into a given tensor.
Tensor constant(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

// out = a @ b. Written into a given tensor, it is also left alone by autocast.
void product(const Tensor& a, const Tensor& b, const Tensor& out) {  // [M, N], [N, P], [M, P]
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // another reference to out
}

Tensor rows(const Tensor& tensor, int64_t first, int64_t count) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, first, count);
}

// Features, the class table and the dot products of some images at a time.
struct Products {
  Shape shape;
  Tensor wide;     // [L * B, D] float32
  Tensor columns;  // [D, U]
  int64_t most;    // images at a time
  Tensor dots;     // [L * most, U]

  Products(const Shape& shape, const Tensor& features, const Tensor& text) : shape(shape) {
    const Tensor floats = features.scalar_type() == ScalarType::Float
                              ? features
                              : torch::stable::to(features, ScalarType::Float);
    wide = torch::stable::view(floats, {shape.views * shape.batch, shape.width});
    columns = torch::stable::transpose(text, 0, 1);
    const int64_t image = int64_t{4} * shape.views * shape.classes;
    most = std::min(shape.batch, std::max<int64_t>(1, kScratch / image));
    dots = torch::stable::new_empty(text, {shape.views * most, shape.classes});
  }

  // Fills dots, [L, most, U], for `images` images from `first`.
  void fill(int64_t first, int64_t images) const {
    if (images == shape.batch) return product(wide, columns, dots);
    for (int view = 0; view < shape.views; ++view) {
      product(rows(wide, view * shape.batch + first, images), columns,
              rows(dots, view * most, images));
    }
  }

  // Calls run(first, images) for each part of the batch, with the dots filled.
  template <typename Run>
  void for_each(const Run& run) const {
    for (int64_t first = 0; first < shape.batch; first += most) {
      const int64_t images = std::min(most, shape.batch - first);
      fill(first, images);
      run(first, images);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
};

template <typename T>
struct Type {
  using type = T;
};

// Calls run(Type<T>()) for the type of the elements.
template <typename Run>
void with_type(ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Float) return run(Type<float>());
  if (dtype == ScalarType::Half) return run(Type<__half>());
  run(Type<__nv_bfloat16>());
}

std::tuple<Tensor, Tensor> drift_head(const Tensor& features,  // [L, B, D]
                                      const Tensor& anchor) {  // [B, D]
  const char* op = "drift_head";
  const Shape shape = shape_of(op, features);
  check(fits(anchor, features, features.scalar_type(), {shape.batch, shape.width}), op,
        "anchor must be (B, D) in the dtype and on the device of features");
  const LaunchContext context(features);
  const Tensor from = constant(features), fixed = constant(anchor);
  Tensor tau = torch::stable::new_empty(from, {shape.batch}, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(from, from.sizes());
  if (shape.batch == 0) return {tau, gradient};
  with_type(features.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const dim3 grid(static_cast<unsigned>(shape.batch), static_cast<unsigned>(shape.views));
    drift_kernel<T><<<grid, kGroup, 0, context.stream>>>(
        data<T>(from), data<T>(fixed), mutable_data<float>(tau), mutable_data<T>(gradient), shape);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {tau, gradient};
}

std::tuple<Tensor, Tensor, Tensor> pseudo_label(const Tensor& features,  // [L, B, D]
                                                const Tensor& text,      // [U, D] float32
                                                const std::optional<Tensor>& count,  // [U] int64
                                                double scale, double /* the same for all */,
                                                double temperature) {
  const char* op = "pseudo_label";
  const Shape shape = shape_of(op, features, text);
  check_count(op, count, features, shape);
  check(temperature > 0.0, op, "temperature must be above 0");
  check_not_negative(op, "scale must be a finite number >= 0", {scale});
  const LaunchContext context(features);
  const Tensor from = constant(features), table = constant(text);
  const Tensor held = count ? constant(*count) : table;
  const int64_t* counts = count ? data<int64_t>(held) : nullptr;
  Tensor q = torch::stable::new_empty(table, {shape.batch, shape.classes});
  Tensor label = torch::stable::new_empty(table, {shape.batch}, ScalarType::Long);
  Tensor soft = torch::stable::new_empty(table, {shape.batch, shape.width});
  if (shape.batch == 0) return {q, label, soft};
  const Products products(shape, from, table);
  products.for_each([&](int64_t first, int64_t images) {
    with_type(from.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      pseudo_kernel<T><<<static_cast<unsigned>(images), kBlock, 0, context.stream>>>(
          data<T>(from), mutable_data<float>(products.dots), counts, mutable_data<float>(q),
          mutable_data<int64_t>(label), shape, first, products.most, static_cast<float>(scale),
          static_cast<float>(1.0 / temperature));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const Tensor weights = counts ? rows(products.dots, 0, images) : rows(q, first, images);
    const Tensor sums = rows(soft, first, images);
    product(weights, table, sums);
    normalise_kernel<<<static_cast<unsigned>(images), kGroup, 0, context.stream>>>(
        mutable_data<float>(sums), shape.width);
  });
  return {q, label, soft};
}

std::tuple<Tensor, Tensor> margin_head(const Tensor& features,              // [L, B, D]
                                       const Tensor& soft,                  // [B, D] float32
                                       const Tensor& label,                 // [B] int64
                                       const Tensor& text,                  // [U, D] float32
                                       const std::optional<Tensor>& count,  // [U] int64
                                       double scale) {
  const char* op = "margin_head";
  const Shape shape = shape_of(op, features, text);
  check(fits(soft, features, ScalarType::Float, {shape.batch, shape.width}), op,
        "soft must be (B, D) float32 on the device of features");
  check(fits(label, features, ScalarType::Long, {shape.batch}), op,
        "label must be (B,) int64 on the device of features");
  check_count(op, count, features, shape);
  const LaunchContext context(features);
  const Tensor from = constant(features), table = constant(text);
  const Tensor target = constant(soft), labels = constant(label);
  const Tensor held = count ? constant(*count) : table;
  const int64_t* counts = count ? data<int64_t>(held) : nullptr;
  Tensor value = torch::stable::new_empty(table, {shape.batch});
  Tensor gradient = torch::stable::new_empty(from, from.sizes());
  if (shape.batch == 0) return {value, gradient};
  const Products products(shape, from, table);
  products.for_each([&](int64_t first, int64_t images) {
    with_type(from.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const auto kernel = counts ? margin_kernel<T, true> : margin_kernel<T, false>;
      kernel<<<static_cast<unsigned>(images), kBlock, 0, context.stream>>>(
          data<T>(from), data<float>(products.dots), data<float>(target), data<int64_t>(labels),
          data<float>(table), counts, mutable_data<float>(value), mutable_data<T>(gradient), shape,
          first, products.most, static_cast<float>(scale / shape.views));
    });
  });
  return {value, gradient};
}

Tensor mean_logits(const Tensor& features,                // [L, B, D]
                   const Tensor& text,                    // [U, D] float32
                   const std::optional<Tensor>& weights,  // [L, B] float32
                   double scale, double bias, bool unit) {
  const Shape shape = shape_of("mean_logits", features, text);
  check(!weights || fits(*weights, features, ScalarType::Float, {shape.views, shape.batch}),
        "mean_logits", "weights must be (L, B) float32 on the device of features");
  const LaunchContext context(features);
  const Tensor from = constant(features), table = constant(text);
  Tensor out = torch::stable::new_empty(table, {shape.batch, shape.classes});
  if (shape.batch == 0) return out;
  const Tensor means = torch::stable::new_empty(table, {shape.batch, shape.width});
  const Tensor held = weights ? constant(*weights) : table;
  const float factor = static_cast<float>(weights || unit ? scale : scale / shape.views);
  with_type(from.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const unsigned blocks = static_cast<unsigned>(shape.batch);
    if (weights || unit) {
      weighted_units_kernel<T><<<blocks, kGroup, 0, context.stream>>>(
          data<T>(from), weights ? data<float>(held) : nullptr, mutable_data<float>(means), shape,
          factor, unit);
    } else {
      mean_units_kernel<T><<<blocks, kBlock, 0, context.stream>>>(
          data<T>(from), mutable_data<float>(means), shape, factor);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  product(means, torch::stable::transpose(table, 0, 1), out);
  if (bias == 0.0) return out;
  add_kernel<<<grid_size(out.numel(), kGroup), kGroup, 0, context.stream>>>(
      mutable_data<float>(out), out.numel(), static_cast<float>(bias));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor, Tensor> view_weights(const Tensor& features,  // [L, B, D]
                                                double low, double high, double threshold,
                                                double slope, bool geodesic) {
  const Shape shape = shape_of("view_weights", features);
  check(shape.views >= 2, "view_weights", "features must be of at least 2 views");
  const LaunchContext context(features);
  const Tensor from = constant(features);
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(from, std::vector<int64_t>(sizes), ScalarType::Float);
  };
  Tensor weights = floats({shape.views, shape.batch}), cosine = floats({shape.batch});
  Tensor agreement = floats({shape.batch}), mean = floats({shape.batch, shape.width});
  if (shape.batch == 0) return {weights, cosine, agreement};
  const Extrapolation rule = extrapolation(low, high, threshold, slope, geodesic);
  with_type(from.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    view_weights_kernel<T><<<static_cast<unsigned>(shape.batch), kGroup, 0, context.stream>>>(
        data<T>(from), mutable_data<float>(mean), mutable_data<float>(weights),
        mutable_data<float>(cosine), mutable_data<float>(agreement), shape, rule);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {weights, cosine, agreement};
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CUDA, m) {
  m.impl("drift_head", TORCH_BOX(&scc_fast::drift_head));
  m.impl("pseudo_label", TORCH_BOX(&scc_fast::pseudo_label));
  m.impl("margin_head", TORCH_BOX(&scc_fast::margin_head));
  m.impl("mean_logits", TORCH_BOX(&scc_fast::mean_logits));
  m.impl("view_weights", TORCH_BOX(&scc_fast::view_weights));
}
