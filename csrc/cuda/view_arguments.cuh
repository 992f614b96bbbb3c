// The arguments of make_views, make_views_adjoint and pgd_step_: checked, and made a kernel's.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/views.cuh"
#include "tensor.h"

namespace scc_fast {

inline void check_pixels(const char* op, const char* rule, const Tensor& x) {
  check(x.dim() == 4 && x.size(1) == 3 && x.scalar_type() == ScalarType::Float, op, rule);
  check(x.size(2) < (int64_t{1} << 31) && x.size(3) < (int64_t{1} << 31) &&
            3 * x.size(2) * x.size(3) < (int64_t{1} << 31),
        op, "x must have fewer than 2^31 numbers in an image");
}

inline bool same_device(const Tensor& tensor, const Tensor& x) {
  return tensor.is_cuda() && tensor.get_device_index() == x.get_device_index();
}

inline bool like(const Tensor& tensor, const Tensor& x) {
  return same_device(tensor, x) && tensor.scalar_type() == x.scalar_type() &&
         tensor.sizes().equals(x.sizes());
}

inline void check_seeds(const char* op, const Tensor& seeds, const Tensor& x) {
  check(seeds.dim() == 1 && seeds.size(0) == x.size(0) && same_device(seeds, x) &&
            seeds.scalar_type() == ScalarType::Long,
        op, "seeds must be (B,) int64 on the device of x");
}

inline void check_patch(const char* op, int64_t patch, const Tensor& x) {
  check(patch >= 0 && patch <= std::min(x.size(2), x.size(3)), op,
        "patch must be in [0, min(H, W)]");
}

inline Plan plan_of(const char* op, const std::vector<int64_t>& plan,
                    const std::vector<double>& noise, const Tensor& x) {
  check(!noise.empty() && noise.size() <= kMaxViews, op, "views must be 1 to 128, one noise each");
  check_noise(op, noise);
  check(plan.size() == 3 * noise.size(), op, "plan must be (flip, down, right) of each view");
  Plan out = {};
  out.count = static_cast<int>(noise.size());
  for (size_t i = 0; i < noise.size(); ++i) {
    out.view[i] = planned_view(plan[3 * i], plan[3 * i + 1], plan[3 * i + 2],
                               static_cast<float>(noise[i]), x.size(2), x.size(3));
  }
  return out;
}

inline bool is_noisy(const Plan& plan) {
  return std::any_of(plan.view, plan.view + plan.count,
                     [](const PlannedView& view) { return view.noise > 0.0f; });
}

inline void three(const char* op, const char* rule, const std::vector<double>& numbers,
                  float* out) {
  check(numbers.size() == 3, op, rule);
  for (int i = 0; i < 3; ++i) out[i] = static_cast<float>(numbers[i]);
}

inline std::vector<int64_t> views_shape(const Tensor& x, int64_t views, int64_t patch) {
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  if (patch == 0) return {views * batch, 3, height, width};
  return {views * batch, (height / patch) * (width / patch), 3 * patch * patch};
}

inline bool is_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
}

inline void check_gradient(const char* op, const Tensor& gradient, const Tensor& x, int64_t views,
                           int64_t patch) {
  const std::vector<int64_t> shape = views_shape(x, views, patch);
  check(is_dtype(gradient.scalar_type()), op, "gradient must be float32, float16 or bfloat16");
  check(same_device(gradient, x) && gradient.sizes().equals(shape), op,
        "gradient must have the shape of make_views' result, on the device of x");
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<float>(*tensor) : nullptr;
}

inline std::optional<Tensor> contiguous_like(const char* op, const char* rule,
                                             const std::optional<Tensor>& tensor, const Tensor& x) {
  if (!tensor) return std::nullopt;
  check(like(*tensor, x), op, rule);
  return torch::stable::contiguous(*tensor);
}

// The most lanes of `most`, ..., 2, 1 that divide every run and find all pointers aligned. Pictures
// are read by at most four lanes at a time.
inline int lanes_of(int most, const Tensor& x, int64_t run,
                    std::initializer_list<const void*> pictures, const void* views = nullptr,
                    int element_size = 4) {
  const auto aligned = [](const void* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  for (int lanes = most; lanes > 1; lanes = lanes == 8 ? 2 : lanes / 2) {
    const int read = std::min(lanes, 4);
    bool fits = run % lanes == 0 && x.size(3) % read == 0 && aligned(views, lanes * element_size);
    for (const void* picture : pictures) fits = fits && aligned(picture, read * 4);
    if (fits) return lanes;
  }
  return 1;
}

inline dim3 view_grid(const Walk& walk, int64_t batch) {
  return dim3(grid_size(walk.chunks, kViewThreads), grid_size(batch, 1));
}

// Calls launch.run<T, lanes, noisy, patches>() for the dtype of a gradient.
template <typename T, int V, typename Launch>
void with_flags(const Launch& launch, bool noisy, bool patches) {
  if (noisy) {
    patches ? launch.template run<T, V, true, true>() : launch.template run<T, V, true, false>();
  } else {
    patches ? launch.template run<T, V, false, true>() : launch.template run<T, V, false, false>();
  }
}

template <typename T, typename Launch>
void with_lanes(const Launch& launch, int lanes, bool noisy, bool patches) {
  if (lanes == 4) return with_flags<T, 4>(launch, noisy, patches);
  if (lanes == 2) return with_flags<T, 2>(launch, noisy, patches);
  with_flags<T, 1>(launch, noisy, patches);
}

template <typename Launch>
void with_gradient(const Launch& launch, ScalarType dtype, int lanes, bool noisy, bool patches) {
  if (dtype == ScalarType::Float) return with_lanes<float>(launch, lanes, noisy, patches);
  if (dtype == ScalarType::Half) return with_lanes<__half>(launch, lanes, noisy, patches);
  with_lanes<__nv_bfloat16>(launch, lanes, noisy, patches);
}

}  // namespace scc_fast
