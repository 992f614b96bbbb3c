// The CUDA kernels as host functions, for tests/test_cuda_on_host.py.
#include "cuda_on_host.h"

#include "cuda/heads.cuh"
#include "cuda/views.cuh"
#include "cuda/warp.cuh"

using namespace scc_fast;

namespace {

struct Batch {
  const int64_t* seeds;
  int64_t images, height, width, patch;
  const int64_t* plan;  // (flip, down, right) of each view
  const float* noise;
  int64_t views, lanes;

  Plan planned() const {
    Plan out = {};
    out.count = static_cast<int>(views);
    for (int64_t i = 0; i < views; ++i) {
      out.view[i] =
          planned_view(plan[3 * i], plan[3 * i + 1], plan[3 * i + 2], noise[i], height, width);
    }
    return out;
  }

  bool noisy() const {
    return std::any_of(noise, noise + views, [](float sigma) { return sigma > 0; });
  }
};

// Fewer blocks and rows of blocks than there is work: the strides of the loops are used too.
void launch_views(std::function<void()> call) { launch({2, 2}, kViewThreads, false, call); }

template <typename T, int V>
void make(const Batch& b, const float* x, const float* delta, const Colours& colours, void* out) {
  const Plan plan = b.planned();
  const Walk walk = walk_of(b.height, b.width, b.patch, b.patch != 0, V);
  const auto kernel = b.noisy() ? make_views_kernel<T, V, true> : make_views_kernel<T, V, false>;
  launch_views(
      [&] { kernel(x, delta, b.seeds, static_cast<T*>(out), b.images, walk, plan, colours); });
}

template <typename T, int V, bool kNoise, bool kPatches>
void gather_views(const Batch& b, const void* gradient, const float* x, float* delta,
                  const Colours* colours, const StepSize& size, float* out) {
  const Plan plan = b.planned();
  const Walk walk = walk_of(b.height, b.width, b.patch, false, V);
  const int64_t numbers =
      3 * (kPatches ? int64_t{walk.down} * walk.across * b.patch * b.patch : b.height * b.width);
  const Gathered<T> in = {static_cast<const T*>(gradient), b.seeds, b.images, numbers};
  launch_views([&] {
    if (colours) {
      adjoint_kernel<T, V, kNoise, kPatches>(in, x, delta, out, walk, plan, *colours);
    } else {
      step_kernel<T, V, kNoise, kPatches>(in, x, delta, out, size, walk, plan);
    }
  });
}

template <typename T, int V, typename... Rest>
void gather_any(const Batch& b, Rest... rest) {
  if (b.noisy()) {
    b.patch ? gather_views<T, V, true, true>(b, rest...)
            : gather_views<T, V, true, false>(b, rest...);
  } else {
    b.patch ? gather_views<T, V, false, true>(b, rest...)
            : gather_views<T, V, false, false>(b, rest...);
  }
}

template <typename T, typename... Rest>
void gather_lanes(const Batch& b, Rest... rest) {
  if (b.lanes == 4) return gather_any<T, 4>(b, rest...);
  if (b.lanes == 2) return gather_any<T, 2>(b, rest...);
  gather_any<T, 1>(b, rest...);
}

}  // namespace

extern "C" {

void make_views(const Batch* b, bool half, const float* x, const float* delta,
                const Colours* colours, void* out) {
  using H = __nv_bfloat16;
  if (b->lanes == 8) return make<H, 8>(*b, x, delta, *colours, out);
  if (b->lanes == 4) return make<float, 4>(*b, x, delta, *colours, out);
  if (b->lanes == 2) {
    return half ? make<H, 2>(*b, x, delta, *colours, out)
                : make<float, 2>(*b, x, delta, *colours, out);
  }
  half ? make<H, 1>(*b, x, delta, *colours, out) : make<float, 1>(*b, x, delta, *colours, out);
}

// The adjoint into `out` where there are colours, else the step on delta, with `out` the sum.
void gather_views(const Batch* b, bool half, const void* gradient, const float* x, float* delta,
                  const Colours* colours, const StepSize* size, float* out) {
  half ? gather_lanes<__nv_bfloat16>(*b, gradient, x, delta, colours, *size, out)
       : gather_lanes<float>(*b, gradient, x, delta, colours, *size, out);
}

// Colours are fill, mean and std; shape is of the picture, the view and the patch.
void warp_views(const int64_t* shape, int64_t pairs, int64_t batch, bool half, bool cubic,
                bool filled, const float* x, const float* matrix, const int64_t* box,
                const int64_t* samples, const float* colours, void* out) {
  Warp warp = warp_of(shape[0], shape[1], shape[2], shape[3], shape[4]);
  warp.filled = filled;
  std::copy_n(colours, 3, warp.fill);
  std::copy_n(colours + 3, 3, warp.mean);
  std::copy_n(colours + 6, 3, warp.std);
  launch({2, 2}, kWarpThreads, false, [&] {
    if (half) {
      const auto kernel = cubic ? warp_kernel<__nv_bfloat16, 4> : warp_kernel<__nv_bfloat16, 2>;
      kernel(x, matrix, box, samples, static_cast<__nv_bfloat16*>(out), pairs, batch, warp);
    } else {
      const auto kernel = cubic ? warp_kernel<float, 4> : warp_kernel<float, 2>;
      kernel(x, matrix, box, samples, static_cast<float*>(out), pairs, batch, warp);
    }
  });
}

void drift(const Shape* shape, const float* features, const float* anchor, float* tau,
           float* gradient) {
  launch({unsigned(shape->batch), 2}, kGroup, true,
         [&] { drift_kernel(features, anchor, tau, gradient, *shape); });
}

// dots are of all images at once.
void margin(const Shape* shape, const float* features, const float* dots, const float* soft,
            const int64_t* label, const float* text, const int64_t* count, float* value,
            float* gradient, float factor) {
  const auto kernel = count ? margin_kernel<float, true> : margin_kernel<float, false>;
  launch({unsigned(shape->batch), 1}, kBlock, true, [&] {
    kernel(features, dots, soft, label, text, count, value, gradient, *shape, 0, shape->batch,
           factor);
  });
}

void pseudo(const Shape* shape, const float* features, float* dots, const int64_t* count, float* q,
            int64_t* label, float scale, float power) {
  launch({unsigned(shape->batch), 1}, kBlock, true, [&] {
    pseudo_kernel(features, dots, count, q, label, *shape, 0, shape->batch, scale, power);
  });
}

void normalise(const Shape* shape, float* rows) {
  launch({unsigned(shape->batch), 1}, kGroup, true, [&] { normalise_kernel(rows, shape->width); });
}

void add(int64_t numel, float* values, float summand) {
  launch({2, 1}, kGroup, false, [&] { add_kernel(values, numel, summand); });
}

void mean_units(const Shape* shape, const float* features, float* out, float factor) {
  launch({unsigned(shape->batch), 1}, kBlock, true,
         [&] { mean_units_kernel(features, out, *shape, factor); });
}

void weighted_units(const Shape* shape, const float* features, const float* weights, float* out,
                    float factor, bool unit) {
  launch({unsigned(shape->batch), 1}, kGroup, true,
         [&] { weighted_units_kernel(features, weights, out, *shape, factor, unit); });
}

void view_weights(const Shape* shape, const float* features, float* mean, float* weights,
                  float* cosine, float* agreement, const Extrapolation* rule) {
  launch({unsigned(shape->batch), 1}, kGroup, true,
         [&] { view_weights_kernel(features, mean, weights, cosine, agreement, *shape, *rule); });
}

uint32_t divide(uint32_t dividend, uint32_t divisor) { return dividend / Divisor(divisor); }

void normalise_many(int64_t count, float mean, float std, float* values) {
  for (int64_t i = 0; i < count; ++i) normalise_all<1>(mean, std, 1.0f / std, values + i);
}
}
