// philox_uniform, philox_normal on the CPU.
#include "cpu/random.h"
#include "cpu/simd.h"
#include "pixel_math.h"
#include "tensor.h"

namespace scc_fast {
namespace {

constexpr int64_t kTile = 64;  // blocks of four numbers in one run of the vectorised loop

template <Floats Transform(Words)>
SCC_INLINE void fill(float* SCC_RESTRICT out, int64_t count, int64_t seed, int64_t block,
                     uint32_t view, uint32_t purpose) {
  float tile[4 * kTile];
  for (int64_t done = 0; done < count; done += 4 * kTile, block += kTile) {
    const bool whole = count - done >= 4 * kTile;
    float* SCC_RESTRICT to = whole ? out + done : tile;
    for (int64_t i = 0; i < kTile; ++i) {
      const Floats values = Transform(random_words(seed, block + i, view, purpose));
      for (int lane = 0; lane < 4; ++lane) to[4 * i + lane] = values.f[lane];
    }
    if (!whole) memcpy(out + done, tile, sizeof(float) * (count - done));
  }
}

}  // namespace

SCC_CLONES void fill_uniform(float* out, int64_t count, int64_t seed, int64_t block, uint32_t view,
                             uint32_t purpose) {
  fill<uniform4>(out, count, seed, block, view, purpose);
}

SCC_CLONES void fill_normal(float* out, int64_t count, int64_t seed, int64_t block, uint32_t view,
                            uint32_t purpose) {
  fill<normal4>(out, count, seed, block, view, purpose);
}

namespace {

using Fill = void (*)(float*, int64_t, int64_t, int64_t, uint32_t, uint32_t);

constexpr int64_t kChunk = 2048;  // blocks of four numbers that a thread takes at a time

Tensor generate(Fill run, const char* op, const Tensor& seeds,  // [B] int64
                int64_t purpose, int64_t view, int64_t numel) {
  check(seeds.dim() == 1 && seeds.scalar_type() == ScalarType::Long, op,
        "seeds must be (B,) int64");
  check_stream(op, purpose, view, numel);
  const Tensor keys = torch::stable::contiguous(seeds);
  const int64_t batch = keys.size(0);
  const int64_t chunks = (numel + 4 * kChunk - 1) / (4 * kChunk);  // per image
  Tensor out = torch::stable::new_empty(seeds, {batch, numel}, ScalarType::Float);
  const auto* key = static_cast<const int64_t*>(keys.const_data_ptr());
  auto* result = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / chunks, block = i % chunks * kChunk;
      const int64_t left = numel - 4 * block;
      run(result + image * numel + 4 * block, left < 4 * kChunk ? left : 4 * kChunk, key[image],
          block, static_cast<uint32_t>(view), static_cast<uint32_t>(purpose));
    }
  });
  return out;
}

Tensor philox_uniform(const Tensor& seeds, int64_t purpose, int64_t view, int64_t numel) {
  return generate(fill_uniform, "philox_uniform", seeds, purpose, view, numel);
}

Tensor philox_normal(const Tensor& seeds, int64_t purpose, int64_t view, int64_t numel) {
  return generate(fill_normal, "philox_normal", seeds, purpose, view, numel);
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("philox_uniform", TORCH_BOX(&scc_fast::philox_uniform));
  m.impl("philox_normal", TORCH_BOX(&scc_fast::philox_normal));
}
