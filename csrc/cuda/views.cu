// make_views, make_views_adjoint on CUDA.
#include "cuda/view_arguments.cuh"
#include "cuda/views.cuh"
#include "tensor.h"

namespace scc_fast {
namespace {

using Numbers = std::vector<double>;
using Picture = std::optional<Tensor>;

struct MakeViews {
  const float* x;
  const float* delta;
  const int64_t* seeds;
  void* out;
  int64_t batch;
  Walk walk;
  const Plan& plan;
  const Colours& colours;
  cudaStream_t stream;

  template <typename T, int V>
  void run() const {
    const auto kernel =
        is_noisy(plan) ? make_views_kernel<T, V, true> : make_views_kernel<T, V, false>;
    kernel<<<view_grid(walk, batch), kViewThreads, 0, stream>>>(
        x, delta, seeds, static_cast<T*>(out), batch, walk, plan, colours);
  }

  template <typename T>
  void run(int lanes) const {
    constexpr int kMost = 16 / sizeof(T);
    if (lanes == kMost) return run<T, kMost>();
    if (lanes == 2) return run<T, 2>();
    run<T, 1>();
  }
};

Tensor make_views(const Tensor& x,       // [B, 3, H, W] float32
                  const Picture& delta,  // like x, or none
                  const Tensor& seeds,   // [B] int64
                  const std::vector<int64_t>& plan, const Numbers& noise, const Numbers& fill,
                  const Numbers& mean, const Numbers& std, ScalarType dtype, int64_t patch) {
  const char* op = "make_views";
  check_pixels(op, "x must be (B, 3, H, W) float32", x);
  check(x.is_cuda(), op, "x must be on the GPU");
  check_seeds(op, seeds, x);
  check_patch(op, patch, x);
  check(is_dtype(dtype), op, "dtype must be float32, float16 or bfloat16");
  const Plan views = plan_of(op, plan, noise, x);
  Colours colours;
  three(op, "fill must be three numbers", fill, colours.fill);
  three(op, "mean must be three numbers", mean, colours.mean);
  three(op, "std must be three numbers", std, colours.std);
  const LaunchContext context(x);
  const Picture change = contiguous_like(op, "delta must be like x", delta, x);
  const Tensor pixels = torch::stable::contiguous(x), keys = torch::stable::contiguous(seeds);
  Tensor out = torch::stable::new_empty(x, views_shape(x, views.count, patch), dtype);
  if (out.numel() == 0) return out;

  const auto* from = data<float>(pixels);
  const auto* moved = data_or_null(change);
  void* to = out.mutable_data_ptr();
  const int size = static_cast<int>(out.element_size());
  const int64_t run = patch ? patch : x.size(3);
  const int lanes = lanes_of(16 / size, x, run, {from, moved}, to, size);
  const Walk walk = walk_of(x.size(2), x.size(3), patch, patch != 0, lanes);
  const MakeViews launch = {from,  moved,   data<int64_t>(keys), to, x.size(0), walk,
                            views, colours, context.stream};
  if (dtype == ScalarType::Float) {
    launch.run<float>(lanes);
  } else if (dtype == ScalarType::Half) {
    launch.run<__half>(lanes);
  } else {
    launch.run<__nv_bfloat16>(lanes);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

struct Adjoint {
  const Tensor& gradient;
  const int64_t* seeds;
  const float* x;
  const float* delta;
  float* out;
  int64_t batch;
  const Walk& walk;
  const Plan& plan;
  const Colours& colours;
  cudaStream_t stream;

  template <typename T, int V, bool kNoise, bool kPatches>
  void run() const {
    const Gathered<T> in = {data<T>(gradient), seeds, batch,
                            gradient.numel() / (batch * plan.count)};
    adjoint_kernel<T, V, kNoise, kPatches><<<view_grid(walk, batch), kViewThreads, 0, stream>>>(
        in, x, delta, out, walk, plan, colours);
  }
};

Tensor make_views_adjoint(const Tensor& gradient,  // like make_views' result
                          const Tensor& x,         // [B, 3, H, W] float32
                          const Picture& delta,    // like x, or none
                          const Tensor& seeds,     // [B] int64
                          const std::vector<int64_t>& plan, const Numbers& noise,
                          const Numbers& std, int64_t patch) {
  const char* op = "make_views_adjoint";
  check_pixels(op, "x must be (B, 3, H, W) float32", x);
  check(x.is_cuda(), op, "x must be on the GPU");
  check_seeds(op, seeds, x);
  check_patch(op, patch, x);
  const Plan views = plan_of(op, plan, noise, x);
  check_gradient(op, gradient, x, views.count, patch);
  Colours colours = {};
  three(op, "std must be three numbers", std, colours.std);
  const LaunchContext context(x);
  const Picture change = contiguous_like(op, "delta must be like x", delta, x);
  const Tensor pixels = torch::stable::contiguous(x), keys = torch::stable::contiguous(seeds);
  const Tensor shown = torch::stable::contiguous(gradient);
  Tensor out = torch::stable::new_empty(x, x.sizes(), ScalarType::Float);
  if (out.numel() == 0) return out;

  const auto* from = data<float>(pixels);
  const auto* moved = data_or_null(change);
  auto* to = mutable_data<float>(out);
  const int size = static_cast<int>(shown.element_size());
  const int lanes =
      lanes_of(4, x, patch ? patch : x.size(3), {from, moved, to}, shown.const_data_ptr(), size);
  const Walk walk = walk_of(x.size(2), x.size(3), patch, false, lanes);
  const Adjoint launch = {shown,   data<int64_t>(keys), from, moved, to, x.size(0), walk, views,
                          colours, context.stream};
  with_gradient(launch, shown.scalar_type(), lanes, is_noisy(views), patch != 0);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CUDA, m) {
  m.impl("make_views", TORCH_BOX(&scc_fast::make_views));
  m.impl("make_views_adjoint", TORCH_BOX(&scc_fast::make_views_adjoint));
}
