// philox_uniform, philox_normal on the CPU.
#include "pixel_math.h"
#include "tensor.h"

namespace {

using scc_fast::Floats;
using scc_fast::Tensor;
using scc_fast::Words;

constexpr int64_t kGrain = 2048;  // blocks of four numbers a thread takes at least

template <Floats Transform(Words)>
Tensor generate(const char* op, const Tensor& seeds,  // [B] int64
                int64_t purpose, int64_t view, int64_t numel) {
  scc_fast::check(seeds.dim() == 1 && seeds.scalar_type() == scc_fast::ScalarType::Long, op,
                  "seeds must be (B,) int64");
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t batch = keys.size(0);
  const int64_t blocks = (numel + 3) / 4;  // per image
  Tensor out = torch::stable::new_empty(seeds, {batch, numel}, scc_fast::ScalarType::Float);
  const auto* key = static_cast<const int64_t*>(keys.const_data_ptr());
  auto* result = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / blocks, block = i % blocks;
      const Floats values = Transform(scc_fast::random_words(
          key[image], block, static_cast<uint32_t>(view), static_cast<uint32_t>(purpose)));
      float* to = result + image * numel + 4 * block;
      for (int64_t lane = 0; lane < 4 && 4 * block + lane < numel; ++lane) {
        to[lane] = values.f[lane];
      }
    }
  });
  return out;
}

Tensor philox_uniform(const Tensor& seeds, int64_t purpose, int64_t view, int64_t numel) {
  return generate<scc_fast::uniform4>("philox_uniform", seeds, purpose, view, numel);
}

Tensor philox_normal(const Tensor& seeds, int64_t purpose, int64_t view, int64_t numel) {
  return generate<scc_fast::normal4>("philox_normal", seeds, purpose, view, numel);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("philox_uniform", TORCH_BOX(&philox_uniform));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
}
