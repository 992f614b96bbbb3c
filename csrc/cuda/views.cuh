// The kernels of make_views, make_views_adjoint and pgd_step_. No torch header.
//
// Within one image positions fit in 31 bits (the callers check); across images they are int64.
#pragma once

#include <algorithm>

#include "cuda/vector.cuh"

namespace scc_fast {

constexpr int kViewThreads = 256;
constexpr int kMaxViews = 128;

// Shifts are clamped to the picture's size, past which a view shows nothing but fill.
struct PlannedView {
  int down, right;
  int flip;
  float noise;  // standard deviation
};

inline PlannedView planned_view(int64_t flip, int64_t down, int64_t right, float noise,
                                int64_t height, int64_t width) {
  return {static_cast<int>(std::clamp(down, -height, height)),
          static_cast<int>(std::clamp(right, -width, width)), flip != 0, noise};
}

struct Plan {
  PlannedView view[kMaxViews];  // a multiple of the number gathered at a time
  int count;
};

struct Colours {
  float fill[3], mean[3], std[3];
};

// A picture, and the order in which one image is walked: in chunks along runs, `rows` runs to a
// plane. Runs are the rows of a picture, or those of a patch.
struct Walk {
  int height, width, patch;
  int down, across;  // patches in the picture
  int chunks;        // of one image
  Divisor run;       // chunks of a run
  Divisor rows;
  Divisor by_across, by_patch;
};

// `patch` is 0 for the rows of a picture; `lanes` divides their length.
inline Walk walk_of(int64_t height, int64_t width, int64_t patch, bool by_patches, int lanes) {
  Walk walk = {};
  walk.height = static_cast<int>(height);
  walk.width = static_cast<int>(width);
  walk.patch = static_cast<int>(patch);
  walk.down = static_cast<int>(patch ? height / patch : 0);
  walk.across = static_cast<int>(patch ? width / patch : 0);
  const int64_t pixels = by_patches ? walk.down * walk.across * patch * patch : height * width;
  walk.chunks = static_cast<int>(3 * pixels / lanes);
  walk.run = Divisor((by_patches ? patch : width) / lanes);
  walk.rows = Divisor(by_patches ? patch : height);
  walk.by_across = Divisor(patch ? walk.across : 1);
  walk.by_patch = Divisor(patch ? patch : 1);
  return walk;
}

struct Position {
  int colour, row, column;
};

template <int V>
SCC_HOST_DEVICE Position position(const Walk& walk, uint32_t chunk, bool by_patches) {
  const uint32_t run = chunk / walk.run;
  const uint32_t lane = (chunk - run * walk.run.value) * V;
  const uint32_t plane = run / walk.rows;
  const uint32_t row = run - plane * walk.rows.value;
  if (!by_patches) {
    return {static_cast<int>(plane), static_cast<int>(row), static_cast<int>(lane)};
  }
  const uint32_t patch = plane / 3, patch_row = patch / walk.by_across;
  const uint32_t patch_column = patch - patch_row * walk.by_across.value;
  return {static_cast<int>(plane - 3 * patch), static_cast<int>(patch_row * walk.patch + row),
          static_cast<int>(patch_column * walk.patch + lane)};
}

// Where a view keeps the pixel (colour, row, column) of its picture; -1 where no patch covers it.
template <bool kPatches>
SCC_HOST_DEVICE int view_offset(const Walk& walk, int colour, int row, int column) {
  if (!kPatches) return (colour * walk.height + row) * walk.width + column;
  const int down = static_cast<int>(static_cast<uint32_t>(row) / walk.by_patch);
  const int across = static_cast<int>(static_cast<uint32_t>(column) / walk.by_patch);
  if (down >= walk.down || across >= walk.across) return -1;
  const int plane = 3 * (down * walk.across + across) + colour;
  return (plane * walk.patch + row - down * walk.patch) * walk.patch + column - across * walk.patch;
}

// The first of the `V` columns of a view that show those of its picture from `column`, and the
// other way round. A flip reverses them, and is its own inverse.
template <int V>
SCC_HOST_DEVICE int start_in_view(const PlannedView& view, int column, int width) {
  return view.flip ? width - V - column - view.right : column + view.right;
}

template <int V>
SCC_HOST_DEVICE int start_in_picture(const PlannedView& view, int column, int width) {
  return view.flip ? width - V - column - view.right : column - view.right;
}

SCC_HOST_DEVICE bool within(int index, int size) {
  return static_cast<uint32_t>(index) < static_cast<uint32_t>(size);
}

// The normals of `G` elements of a view, from a multiple of G: G is 1, 2 or 4.
template <int G>
SCC_HOST_DEVICE void view_normals(int64_t seed, int view, int element, float* normals) {
  const Words words = random_words(seed, element / 4, static_cast<uint32_t>(view), kViewNoise);
  if (G == 4) {
    const Floats all = normal4(words);
    for (int i = 0; i < G; ++i) normals[i] = all.f[i];
    return;
  }
  const bool second = element & 2;
  float cosine, sine;
  box_muller(second ? words.w[2] : words.w[0], second ? words.w[3] : words.w[1], &cosine, &sine);
  if (G == 2) {
    normals[0] = cosine;
    normals[G - 1] = sine;
  } else {
    normals[0] = element & 1 ? sine : cosine;
  }
}

// ---- From pictures to views ---------------------------------------------------------------------

// normalise() of `V` values below 2^60, to the bit, in half the instructions: with y the rounded
// 1 / std, two corrections of value * y give the rounded quotient unless something underflows
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
template <int V>
SCC_HOST_DEVICE void normalise_all(float mean, float std, float reciprocal, float* values) {
  bool ordinary = (std > 0x1p-60f) & (std < 0x1p60f);
  for (int i = 0; i < V; ++i) {
    ordinary &= fabsf(values[i] - mean) > 0x1p-60f;
  }
  if (!ordinary) {
    for (int i = 0; i < V; ++i) values[i] = normalise(values[i], mean, std);
    return;
  }
  for (int i = 0; i < V; ++i) {
    const float value = values[i] - mean;
    float quotient = value * reciprocal;
    quotient = fmaf(fmaf(-quotient, std, value), reciprocal, quotient);
    values[i] = fmaf(fmaf(-quotient, std, value), reciprocal, quotient);
  }
}

// The pixels x + delta that a view shows in `V` columns from a position, before its noise.
template <int V>
__device__ __forceinline__ void see(const Walk& walk, const PlannedView& view, Position at,
                                    const float* __restrict__ x,      // [B, 3, H, W]
                                    const float* __restrict__ delta,  // like x, or null
                                    int64_t start,                    // of the image
                                    float fill, float* values) {
  constexpr int G = V < 4 ? V : 4;
  const int row = at.row - view.down, column = start_in_picture<V>(view, at.column, walk.width);
  if (!within(row, walk.height)) {
#pragma unroll
    for (int i = 0; i < V; ++i) values[i] = fill;
    return;
  }
  const int64_t first = start + (at.colour * walk.height + row) * walk.width;
  float wide[V + G] = {}, change[V + G] = {};
  read_row<V, G>(x + first, column, walk.width, fill, wide);
  if (delta != nullptr) {
    read_row<V, G>(delta + first, column, walk.width, 0.0f, change);
#pragma unroll
    for (int i = 0; i < V + G; ++i) wide[i] += change[i];
  }
  drop_lag<V, G>(column, view.flip, wide, values);
}

// A thread makes the same `V` outputs of all views of an image, so that x and delta come from
// memory once. Images lie along y.
template <typename T, int V, bool kNoise>
__global__ void __launch_bounds__(kViewThreads)
    make_views_kernel(const float* __restrict__ x,        // [B, 3, H, W]
                      const float* __restrict__ delta,    // [B, 3, H, W] or null
                      const int64_t* __restrict__ seeds,  // [B]
                      T* __restrict__ out,                // [L, B, chunks * V]
                      int64_t batch, const __grid_constant__ Walk walk,
                      const __grid_constant__ Plan plan, const __grid_constant__ Colours colours) {
  constexpr int G = V < 4 ? V : 4;
  const int64_t pixels = int64_t{3} * walk.height * walk.width;
  const int64_t numbers = int64_t{walk.chunks} * V;
  const uint32_t first = blockIdx.x * kViewThreads + threadIdx.x;
  const uint32_t stride = gridDim.x * kViewThreads;
  for (int64_t image = blockIdx.y; image < batch; image += gridDim.y) {
    for (uint32_t chunk = first; chunk < static_cast<uint32_t>(walk.chunks); chunk += stride) {
      const Position at = position<V>(walk, chunk, walk.patch != 0);
      const float fill = colours.fill[at.colour], mean = colours.mean[at.colour];
      const float std = colours.std[at.colour], reciprocal = 1.0f / std;
      T* to = out + image * numbers + int64_t{chunk} * V;
      for (int view = 0; view < plan.count; ++view, to += batch * numbers) {
        float values[V];
        see<V>(walk, plan.view[view], at, x, delta, image * pixels, fill, values);
        const float sigma = plan.view[view].noise;
        if (kNoise && sigma > 0.0f) {
          const int element = (at.colour * walk.height + at.row) * walk.width + at.column;
#pragma unroll
          for (int i = 0; i < V; i += G) {
            float normals[G];
            view_normals<G>(seeds[image], view, element + i, normals);
#pragma unroll
            for (int j = 0; j < G; ++j) {
              values[i + j] = clamp(add_noise(values[i + j], sigma, normals[j]), 0.0f, 1.0f);
            }
          }
        }
        normalise_all<V>(mean, std, reciprocal, values);
        store<V>(to, values);
      }
    }
  }
}

// ---- From the gradients of views to pictures ----------------------------------------------------

// The two chunks of `V` gradients of a view that hold those of `V` pixels from `column`, a multiple
// of V; zeros where the view has none. Addresses are made in any case, so that nothing branches.
template <typename T, int V, bool kPatches>
__device__ __forceinline__ void read_gradients(const Walk& walk, const T* __restrict__ gradient,
                                               int colour, int row, int column, bool first,
                                               bool second,
                                               typename Word<V * sizeof(T)>::type (&words)[2]) {
  using W = typename Word<V * sizeof(T)>::type;
  const bool row_is_inside = within(row, walk.height);
  first = first & row_is_inside & within(column, walk.width);
  second = second & row_is_inside & within(column + V, walk.width);
  const int offset = view_offset<kPatches>(walk, colour, row, column);
  const int next = kPatches ? view_offset<kPatches>(walk, colour, row, column + V) : offset + V;
  words[0] = words[1] = W{};
  if (first & (!kPatches | (offset >= 0))) {
    words[0] = __ldg(reinterpret_cast<const W*>(gradient + offset));
  }
  if (second & (!kPatches | (next >= 0))) {
    words[1] = __ldg(reinterpret_cast<const W*>(gradient + next));
  }
}

// Stops the gradients of the pixels, x + delta, that this view's noise takes out of [0, 1].
template <int V>
__device__ __forceinline__ void mask_clamped(const Walk& walk, const PlannedView& view, int index,
                                             Position at, const float* shown, int64_t seed,
                                             float* part) {
  const int row = at.row + view.down, column = start_in_view<V>(view, at.column, walk.width);
  if (view.noise <= 0.0f || !within(row, walk.height)) return;
  const int first = (at.colour * walk.height + row) * walk.width;
  float wide[2 * V] = {}, noise[V];
  read_chunks<V, V>(
      column,
      [&](int from, float* values) {
        if (within(from, walk.width)) view_normals<V>(seed, index, first + from, values);
      },
      wide);
  drop_lag<V, V>(column, view.flip, wide, noise);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (!in_box(add_noise(shown[i], view.noise, noise[i]))) part[i] = 0.0f;
  }
}

// Adds up the gradients of `V` pixels over the views, in order: of some views at a time, which are
// all asked for before any is waited for.
template <typename T, int V, bool kNoise, bool kPatches>
__device__ __forceinline__ void gather(const Walk& walk, const Plan& plan, Position at,
                                       const T* __restrict__ gradient,  // first view of the image
                                       int64_t stride,                  // from view to view
                                       const float* shown, int64_t seed, float* sum) {
  constexpr int kAhead = kNoise ? 1 : sizeof(T) == 4 ? 2 : 4;
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = 0.0f;
#pragma unroll 1
  for (int base = 0; base < plan.count; base += kAhead) {
    typename Word<V * sizeof(T)>::type words[kAhead][2];
    int starts[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i, gradient += stride) {
      const PlannedView& view = plan.view[base + i];  // past the count a plan holds zeros
      const bool exists = base + i < plan.count;
      starts[i] = start_in_view<V>(view, at.column, walk.width);
      const int lag = starts[i] & (V - 1);
      read_gradients<T, V, kPatches>(walk, gradient, at.colour, at.row + view.down, starts[i] - lag,
                                     exists, exists & (lag != 0), words[i]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const PlannedView& view = plan.view[base + i];
      float wide[2 * V], part[V];
      unpack<V, T>(words[i][0], wide);
      unpack<V, T>(words[i][1], wide + V);
      drop_lag<V, V>(starts[i], view.flip, wide, part);
      if (kNoise) mask_clamped<V>(walk, view, base + i, at, shown, seed, part);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += part[j];
    }
  }
}

// What make_views_adjoint and pgd_step_ read.
template <typename T>
struct Gathered {
  const T* gradient;     // [L, B, numbers]
  const int64_t* seeds;  // [B]
  int64_t batch, numbers;
};

// A thread owns `V` pixels.
template <typename T, int V, bool kNoise, bool kPatches>
__global__ void __launch_bounds__(kViewThreads)
    adjoint_kernel(const __grid_constant__ Gathered<T> in,
                   const float* __restrict__ x,      // [B, 3, H, W]
                   const float* __restrict__ delta,  // [B, 3, H, W] or null
                   float* __restrict__ out,          // [B, 3, H, W]
                   const __grid_constant__ Walk walk, const __grid_constant__ Plan plan,
                   const __grid_constant__ Colours colours) {
  const int64_t pixels = int64_t{3} * walk.height * walk.width;
  const uint32_t first = blockIdx.x * kViewThreads + threadIdx.x;
  const uint32_t stride = gridDim.x * kViewThreads;
  for (int64_t image = blockIdx.y; image < in.batch; image += gridDim.y) {
    for (uint32_t chunk = first; chunk < static_cast<uint32_t>(walk.chunks); chunk += stride) {
      const Position at = position<V>(walk, chunk, false);
      const int64_t place = image * pixels + int64_t{chunk} * V;
      float shown[V] = {}, sum[V];
      if (kNoise) {
        load_constant<V>(x + place, shown);
        if (delta != nullptr) {
          float change[V];
          load_constant<V>(delta + place, change);
#pragma unroll
          for (int i = 0; i < V; ++i) shown[i] += change[i];
        }
      }
      gather<T, V, kNoise, kPatches>(walk, plan, at, in.gradient + image * in.numbers,
                                     in.batch * in.numbers, shown, kNoise ? in.seeds[image] : 0,
                                     sum);
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] /= colours.std[at.colour];
      store<V>(out + place, sum);
    }
  }
}

struct StepSize {
  float alpha, epsilon, weight;
};

template <typename T, int V, bool kNoise, bool kPatches>
__global__ void __launch_bounds__(kViewThreads)
    step_kernel(const __grid_constant__ Gathered<T> in,
                const float* __restrict__ x,   // [B, 3, H, W]
                float* __restrict__ delta,     // [B, 3, H, W], overwritten
                float* __restrict__ weighted,  // [B, 3, H, W] or null, overwritten
                StepSize size, const __grid_constant__ Walk walk,
                const __grid_constant__ Plan plan) {
  const int64_t pixels = int64_t{3} * walk.height * walk.width;
  const uint32_t first = blockIdx.x * kViewThreads + threadIdx.x;
  const uint32_t stride = gridDim.x * kViewThreads;
  for (int64_t image = blockIdx.y; image < in.batch; image += gridDim.y) {
    for (uint32_t chunk = first; chunk < static_cast<uint32_t>(walk.chunks); chunk += stride) {
      const Position at = position<V>(walk, chunk, false);
      const int64_t place = image * pixels + int64_t{chunk} * V;
      float pixel[V], change[V], shown[V], sum[V];
      load_constant<V>(x + place, pixel);
      load<V>(delta + place, change);
#pragma unroll
      for (int i = 0; i < V; ++i) shown[i] = pixel[i] + change[i];
      gather<T, V, kNoise, kPatches>(walk, plan, at, in.gradient + image * in.numbers,
                                     in.batch * in.numbers, shown, kNoise ? in.seeds[image] : 0,
                                     sum);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        change[i] = projected_step(change[i], sum[i], pixel[i], size.alpha, size.epsilon);
      }
      store<V>(delta + place, change);
      if (weighted == nullptr) continue;
      load<V>(weighted + place, shown);
#pragma unroll
      for (int i = 0; i < V; ++i) shown[i] = accumulate(shown[i], size.weight, change[i]);
      store<V>(weighted + place, shown);
    }
  }
}

}  // namespace scc_fast
