// warp_views on CUDA.
#include "cuda/view_arguments.cuh"
#include "cuda/warp.cuh"
#include "tensor.h"

namespace scc_fast {
namespace {

using Numbers = std::vector<double>;

struct Launch {
  const float* x;
  const float* matrix;
  const int64_t* box;
  const int64_t* samples;
  void* out;
  int64_t pairs, batch;
  const Warp& warp;
  bool cubic;
  cudaStream_t stream;

  template <typename T>
  void run() const {
    const dim3 grid(grid_size(int64_t{warp.cells} * warp.plane, kWarpThreads), grid_size(pairs, 1));
    const auto kernel = cubic ? warp_kernel<T, 4> : warp_kernel<T, 2>;
    kernel<<<grid, kWarpThreads, 0, stream>>>(x, matrix, box, samples, static_cast<T*>(out), pairs,
                                              batch, warp);
  }
};

// What has a row for each view of each image.
std::optional<Tensor> of_pairs(const char* rule, const std::optional<Tensor>& given,
                               const Tensor& matrix, int64_t numbers) {
  if (!given) return std::nullopt;
  check(same_device(*given, matrix) && given->scalar_type() == ScalarType::Long &&
            given->dim() >= 2 && given->size(0) == matrix.size(0) &&
            given->size(1) == matrix.size(1) &&
            (numbers == 1 ? given->dim() == 2 : given->dim() == 3 && given->size(2) == numbers),
        "warp_views", rule);
  return torch::stable::contiguous(*given);
}

Tensor warp_views(const Tensor& x,                       // [B, 3, H, W] float32
                  const Tensor& matrix,                  // [V, B, 3, 3] float32
                  const std::optional<Tensor>& box,      // [V, B, 4] int64, or none
                  const std::optional<Tensor>& samples,  // [V, B] int64, or none
                  const std::vector<int64_t>& size, bool cubic, const Numbers& fill,
                  const Numbers& mean, const Numbers& std, ScalarType dtype, int64_t patch) {
  const char* op = "warp_views";
  check_pixels(op, "x must be (B, 3, H, W) float32", x);
  check(x.is_cuda(), op, "x must be on the GPU");
  check(x.size(2) > 0 && x.size(3) > 0, op, "x must have pixels");
  check(same_device(matrix, x) && matrix.scalar_type() == ScalarType::Float && matrix.dim() == 4 &&
            matrix.size(0) > 0 && matrix.size(1) == x.size(0) && matrix.size(2) == 3 &&
            matrix.size(3) == 3,
        op, "matrix must be (V, B, 3, 3) float32 on the device of x");
  check(size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < (int64_t{1} << 31) &&
            size[1] < (int64_t{1} << 31) && 3 * size[0] * size[1] < (int64_t{1} << 31),
        op, "size must be two numbers above 0, of fewer than 2^31 numbers a view");
  check(patch >= 0 && patch <= std::min(size[0], size[1]), op, "patch must be in [0, min(size)]");
  check(is_dtype(dtype), op, "dtype must be float32, float16 or bfloat16");
  Warp warp = warp_of(x.size(2), x.size(3), size[0], size[1], patch);
  warp.filled = !fill.empty();
  if (warp.filled) three(op, "fill must be three numbers or none", fill, warp.fill);
  three(op, "mean must be three numbers", mean, warp.mean);
  three(op, "std must be three numbers", std, warp.std);
  const LaunchContext context(x);
  const Tensor pixels = torch::stable::contiguous(x), maps = torch::stable::contiguous(matrix);
  const auto boxes = of_pairs("box must be (V, B, 4) int64 on the device of x", box, maps, 4);
  const auto counts = of_pairs("samples must be (V, B) int64 on the device of x", samples, maps, 1);
  const int64_t pairs = matrix.size(0) * x.size(0);
  Tensor out =
      torch::stable::new_empty(x,
                               patch ? std::vector<int64_t>{pairs, warp.cells, 3 * patch * patch}
                                     : std::vector<int64_t>{pairs, 3, size[0], size[1]},
                               dtype);
  if (out.numel() == 0) return out;

  const Launch launch = {data<float>(pixels),
                         data<float>(maps),
                         boxes ? data<int64_t>(*boxes) : nullptr,
                         counts ? data<int64_t>(*counts) : nullptr,
                         out.mutable_data_ptr(),
                         pairs,
                         x.size(0),
                         warp,
                         cubic,
                         context.stream};
  if (dtype == ScalarType::Float) {
    launch.run<float>();
  } else if (dtype == ScalarType::Half) {
    launch.run<__half>();
  } else {
    launch.run<__nv_bfloat16>();
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CUDA, m) {
  m.impl("warp_views", TORCH_BOX(&scc_fast::warp_views));
}
