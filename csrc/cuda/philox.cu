// philox_uniform, philox_normal on CUDA.
#include "pixel_math.h"
#include "tensor.h"

namespace {

using scc_fast::Floats;
using scc_fast::Tensor;
using scc_fast::Words;

constexpr int kThreads = 256;

// One thread makes one block of four numbers at a time. Images lie along y: no integer division.
template <Floats Transform(Words)>
__global__ void __launch_bounds__(kThreads)
    generate_kernel(const int64_t* __restrict__ seeds,  // [B]
                    float* __restrict__ out,            // [B, numel]
                    int64_t batch, int64_t numel, uint32_t purpose, uint32_t view) {
  const int64_t blocks = (numel + 3) / 4;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t image = blockIdx.y; image < batch; image += gridDim.y) {
    const int64_t seed = seeds[image];
    float* row = out + image * numel;
    for (int64_t block = first; block < blocks; block += stride) {
      const Floats values = Transform(scc_fast::random_words(seed, block, view, purpose));
      if (numel % 4 == 0) {  // then every row starts on 16 bytes
        reinterpret_cast<float4*>(row)[block] =
            make_float4(values.f[0], values.f[1], values.f[2], values.f[3]);
        continue;
      }
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        if (4 * block + lane < numel) row[4 * block + lane] = values.f[lane];
      }
    }
  }
}

template <Floats Transform(Words)>
Tensor generate(const char* op, const Tensor& seeds,  // [B] int64
                int64_t purpose, int64_t view, int64_t numel) {
  scc_fast::check(seeds.dim() == 1 && seeds.scalar_type() == scc_fast::ScalarType::Long, op,
                  "seeds must be (B,) int64");
  scc_fast::check_stream(op, purpose, view, numel);
  const scc_fast::LaunchContext context(seeds);
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t batch = keys.size(0);
  Tensor out = torch::stable::new_empty(seeds, {batch, numel}, scc_fast::ScalarType::Float);
  if (out.numel() == 0) return out;
  const dim3 grid(scc_fast::grid_size((numel + 3) / 4, kThreads), scc_fast::grid_size(batch, 1));
  generate_kernel<Transform><<<grid, kThreads, 0, context.stream>>>(
      static_cast<const int64_t*>(keys.const_data_ptr()),
      static_cast<float*>(out.mutable_data_ptr()), batch, numel, static_cast<uint32_t>(purpose),
      static_cast<uint32_t>(view));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor philox_uniform(const Tensor& seeds, int64_t purpose, int64_t view, int64_t numel) {
  return generate<scc_fast::uniform4>("philox_uniform", seeds, purpose, view, numel);
}

Tensor philox_normal(const Tensor& seeds, int64_t purpose, int64_t view, int64_t numel) {
  return generate<scc_fast::normal4>("philox_normal", seeds, purpose, view, numel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CUDA, m) {
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}
