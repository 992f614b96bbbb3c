// pgd_step_ on CUDA.
#include "cuda/view_arguments.cuh"
#include "cuda/views.cuh"
#include "tensor.h"

namespace scc_fast {
namespace {

struct Step {
  const Tensor& gradient;
  const int64_t* seeds;
  const float* x;
  float* delta;
  float* weighted;
  int64_t batch;
  StepSize size;
  const Walk& walk;
  const Plan& plan;
  cudaStream_t stream;

  template <typename T, int V, bool kNoise, bool kPatches>
  void run() const {
    const Gathered<T> in = {data<T>(gradient), seeds, batch,
                            gradient.numel() / (batch * plan.count)};
    step_kernel<T, V, kNoise, kPatches><<<view_grid(walk, batch), kViewThreads, 0, stream>>>(
        in, x, delta, weighted, size, walk, plan);
  }
};

void pgd_step_(const Tensor& delta,                    // [B, 3, H, W] float32, overwritten
               const std::optional<Tensor>& weighted,  // like delta, or none; overwritten
               const Tensor& gradient,                 // like make_views' result
               const Tensor& x,                        // [B, 3, H, W] float32
               const Tensor& seeds,                    // [B] int64
               const std::vector<int64_t>& plan, const std::vector<double>& noise, double alpha,
               double epsilon, double weight, int64_t patch) {
  const char* op = "pgd_step_";
  check_pixels(op, "x must be (B, 3, H, W) float32", x);
  check(x.is_cuda(), op, "x must be on the GPU");
  check(like(delta, x) && delta.is_contiguous(), op, "delta must be like x and contiguous");
  check_not_negative(op, "alpha, epsilon and weight must be finite numbers >= 0",
                     {alpha, epsilon, weight});
  check(!weighted || (like(*weighted, x) && weighted->is_contiguous()), op,
        "weighted must be like x and contiguous");
  check_seeds(op, seeds, x);
  check_patch(op, patch, x);
  const Plan views = plan_of(op, plan, noise, x);
  check_gradient(op, gradient, x, views.count, patch);
  if (delta.numel() == 0) return;

  const LaunchContext context(x);
  const Tensor pixels = torch::stable::contiguous(x), keys = torch::stable::contiguous(seeds);
  const Tensor shown = torch::stable::contiguous(gradient);
  const auto* from = data<float>(pixels);
  auto* change = mutable_data<float>(delta);
  auto* sum = weighted ? mutable_data<float>(*weighted) : nullptr;
  const int size = static_cast<int>(shown.element_size());
  const int lanes =
      lanes_of(4, x, patch ? patch : x.size(3), {from, change, sum}, shown.const_data_ptr(), size);
  const Walk walk = walk_of(x.size(2), x.size(3), patch, false, lanes);
  const StepSize step = {static_cast<float>(alpha), static_cast<float>(epsilon),
                         static_cast<float>(weight)};
  const Step launch = {shown, data<int64_t>(keys), from, change, sum, x.size(0), step, walk,
                       views, context.stream};
  with_gradient(launch, shown.scalar_type(), lanes, is_noisy(views), patch != 0);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CUDA, m) {
  m.impl("pgd_step_", TORCH_BOX(&scc_fast::pgd_step_));
}
