// The kernels of the heads, one block per image. No torch header.
//
// Sums and maxima are taken by exchange within a warp, then over the warps, in an order that only
// the block's size sets: the same bits in every run. Features are rows of D numbers, [L, B, D].
#pragma once

#include <cfloat>
#include <climits>

#include "cuda/vector.cuh"
#include "extrapolation.h"

namespace scc_fast {

constexpr int kWarp = 32;
constexpr int kGroup = 256;  // threads that share a row
constexpr int kGroups = 4;   // rows at a time
constexpr int kBlock = kGroup * kGroups;
constexpr int kMaxRows = 128;       // views of the heads
constexpr float kMinNorm = 1e-12f;  // of torch.nn.functional.normalize

// ---- Reduction ----------------------------------------------------------------------------------

__device__ __forceinline__ float exchange(float value, int distance) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, distance);
}

struct Pair {
  float first, second;
};

__device__ __forceinline__ Pair exchange(Pair value, int distance) {
  return {exchange(value.first, distance), exchange(value.second, distance)};
}

// The first maximiser: index INT_MAX where there is none.
struct Best {
  float value;
  int index;
};

__device__ __forceinline__ Best exchange(Best value, int distance) {
  return {exchange(value.value, distance), __shfl_xor_sync(0xFFFFFFFFu, value.index, distance)};
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
  __device__ Pair operator()(Pair a, Pair b) const {
    return {a.first + b.first, a.second + b.second};
  }
};

struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ Best operator()(Best a, Best b) const {
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
  }
};

// Over each kThreads threads of a block that all come here; every one gets the result.
template <int kThreads, typename T, typename Operation>
__device__ T reduce(T value, Operation operation) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T slots[kBlock / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = operation(value, exchange(value, distance));
  }
  if (lane == 0) slots[warp] = value;
  __syncthreads();
  value = slots[warp / kWarps * kWarps + lane % kWarps];
  for (int distance = kWarps / 2; distance > 0; distance /= 2) {
    value = operation(value, exchange(value, distance));
  }
  __syncthreads();  // the slots are free again
  return value;
}

// This thread's part of the square of a row's length; 0 without a row.
template <int kThreads, typename T>
__device__ float square_part(const T* row, int64_t width) {  // [D] or null
  float sum = 0.0f;
  if (row == nullptr) return sum;
  for (int64_t i = threadIdx.x % kThreads; i < width; i += kThreads) {
    const float value = to_float(row[i]);
    sum += value * value;
  }
  return sum;
}

struct Shape {
  int views, classes;
  int64_t batch, width;
};

// ---- drift_head ---------------------------------------------------------------------------------

// Images lie along x, views along y.
template <typename T>
__global__ void __launch_bounds__(kGroup) drift_kernel(const T* __restrict__ features,  // [L, B, D]
                                                       const T* __restrict__ anchors,   // [B, D]
                                                       float* __restrict__ tau,         // [B]
                                                       T* __restrict__ gradient,        // [L, B, D]
                                                       Shape shape) {
  const int64_t image = blockIdx.x;
  const T* anchor = anchors + image * shape.width;
  for (int view = blockIdx.y; view < shape.views; view += gridDim.y) {
    const int64_t row = (view * shape.batch + image) * shape.width;
    float square = 0.0f;
    for (int64_t i = threadIdx.x; i < shape.width; i += kGroup) {
      const float difference = to_float(features[row + i]) - to_float(anchor[i]);
      square += difference * difference;
      gradient[row + i] = from_float<T>(2.0f * difference / static_cast<float>(shape.views));
    }
    if (view != 0) continue;
    const Pair squares =
        reduce<kGroup>(Pair{square, square_part<kGroup>(anchor, shape.width)}, Sum());
    if (threadIdx.x == 0) tau[image] = sqrtf(squares.first) / sqrtf(squares.second);
  }
}

// ---- margin_head --------------------------------------------------------------------------------

// `dots` are of `images` images from `first`, of features as they are: a length does not move the
// maximum of a row.
template <typename T, bool kCounted>
__global__ void __launch_bounds__(kBlock)
    margin_kernel(const T* __restrict__ features,      // [L, B, D]
                  const float* __restrict__ dots,      // [L, images, U]
                  const float* __restrict__ softs,     // [B, D]
                  const int64_t* __restrict__ labels,  // [B]
                  const float* __restrict__ text,      // [U, D]
                  const int64_t* __restrict__ count,   // [U] or null
                  float* __restrict__ value,           // [B]
                  T* __restrict__ gradient,            // [L, B, D]
                  Shape shape, int64_t first, int64_t images, float factor) {
  __shared__ float cosines[kMaxRows];
  const int group = threadIdx.x / kGroup, rank = threadIdx.x % kGroup;
  const int64_t image = first + blockIdx.x;
  const int64_t label = labels[image];
  const float* soft = softs + image * shape.width;
  for (int base = 0; base < shape.views; base += kGroups) {
    const int view = base + group;
    const bool active = view < shape.views;
    const int64_t row = (view * shape.batch + image) * shape.width;
    Best best = {-INFINITY, INT_MAX};
    if (active) {
      const float* scores = dots + (view * images + blockIdx.x) * shape.classes;
      for (int k = rank; k < shape.classes; k += kGroup) {
        const bool present = !kCounted || count[k] > 0;
        if (k != label && present) best = Maximum()(best, Best{scores[k], k});
      }
    }
    best = reduce<kGroup>(best, Maximum());
    // With no other class there is no maximum, and it counts as 0.
    const float* hardest = best.index == INT_MAX ? nullptr : text + best.index * shape.width;
    Pair sums = {0.0f, 0.0f};  // f . f, f . (t_soft - t_hardest)
    for (int64_t i = rank; active && i < shape.width; i += kGroup) {
      const float f = to_float(features[row + i]);
      sums.first += f * f;
      sums.second += f * (soft[i] - (hardest ? hardest[i] : 0.0f));
    }
    sums = reduce<kGroup>(sums, Sum());
    const float norm = sqrtf(sums.first), along = sums.second / norm;
    for (int64_t i = rank; active && i < shape.width; i += kGroup) {
      const float difference = soft[i] - (hardest ? hardest[i] : 0.0f);
      const float unit = to_float(features[row + i]) / norm;
      gradient[row + i] = from_float<T>(factor * (difference - along * unit) / norm);
    }
    if (active && rank == 0) cosines[view] = along;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
  for (int view = 0; view < shape.views; ++view) sum += cosines[view];
  value[image] = factor * sum;
}

// ---- pseudo_label -------------------------------------------------------------------------------

// One view's softmax is exp(slope * dot - peak) / total.
struct Softmax {
  float slope, peak, total;
};

template <typename T>
__device__ void view_softmaxes(const T* features, const float* dots, const int64_t* count,
                               const Shape& shape, int64_t image, int64_t images, float scale,
                               Softmax* out) {  // [L], shared
  const int group = threadIdx.x / kGroup, rank = threadIdx.x % kGroup;
  for (int base = 0; base < shape.views; base += kGroups) {
    const int view = base + group;
    const bool active = view < shape.views;
    const T* row = active ? features + (view * shape.batch + image) * shape.width : nullptr;
    const float* scores = dots + (view * images + blockIdx.x) * shape.classes;
    const float square = reduce<kGroup>(square_part<kGroup>(row, shape.width), Sum());
    const float slope = scale / fmaxf(sqrtf(square), kMinNorm);
    float peak = -INFINITY, total = 0.0f;
    for (int k = rank; active && k < shape.classes; k += kGroup) {
      peak = fmaxf(peak, slope * scores[k]);
    }
    peak = reduce<kGroup>(peak, Maximum());
    for (int k = rank; active && k < shape.classes; k += kGroup) {
      const float weight = count ? static_cast<float>(count[k]) : 1.0f;
      total += weight * expf(slope * scores[k] - peak);
    }
    total = reduce<kGroup>(total, Sum());
    if (active && rank == 0) out[view] = {slope, peak, total};
  }
  __syncthreads();
}

// A class belongs to one thread throughout, which thus reads back what itself wrote. The bias is
// the same for all classes: no softmax sees it. `dots` end as q times count where there is one.
template <typename T>
__global__ void __launch_bounds__(kBlock)
    pseudo_kernel(const T* __restrict__ features,     // [L, B, D]
                  float* dots,                        // [L, images, U], images from `first`
                  const int64_t* __restrict__ count,  // [U] or null
                  float* q,                           // [B, U]
                  int64_t* __restrict__ label,        // [B]
                  Shape shape, int64_t first, int64_t images, float scale, float power) {
  __shared__ Softmax softmax[kMaxRows];
  const int64_t image = first + blockIdx.x;
  if (count) {  // the dots of absent rows give way to one that no softmax sees
    for (int view = 0; view < shape.views; ++view) {
      for (int k = threadIdx.x; k < shape.classes; k += kBlock) {
        if (count[k] <= 0) dots[(view * images + blockIdx.x) * shape.classes + k] = -FLT_MAX;
      }
    }
    __syncthreads();
  }
  view_softmaxes(features, dots, count, shape, image, images, scale, softmax);

  float* row = q + image * shape.classes;
  float peak = 0.0f, total = 0.0f;
  for (int k = threadIdx.x; k < shape.classes; k += kBlock) {
    float sum = 0.0f;
    for (int view = 0; view < shape.views; ++view) {
      const float dot = dots[(view * images + blockIdx.x) * shape.classes + k];
      sum += expf(softmax[view].slope * dot - softmax[view].peak) / softmax[view].total;
    }
    row[k] = sum;
    peak = fmaxf(peak, sum);
  }
  peak = reduce<kBlock>(peak, Maximum());
  for (int k = threadIdx.x; k < shape.classes; k += kBlock) {
    row[k] = powf(row[k] / peak, power);
    total += (count ? static_cast<float>(count[k]) : 1.0f) * row[k];
  }
  total = reduce<kBlock>(total, Sum());
  Best best = {-INFINITY, INT_MAX};
  for (int k = threadIdx.x; k < shape.classes; k += kBlock) {
    row[k] /= total;
    best = Maximum()(best, Best{row[k], k});
    if (count)
      dots[blockIdx.x * int64_t{shape.classes} + k] = row[k] * static_cast<float>(count[k]);
  }
  best = reduce<kBlock>(best, Maximum());
  if (count) {
    for (int k = threadIdx.x; k < shape.classes; k += kBlock) {
      if (count[k] <= 0) row[k] = dots[blockIdx.x * int64_t{shape.classes} + k] = 0.0f;
    }
  }
  if (threadIdx.x != 0) return;
  int found = best.index == INT_MAX ? 0 : best.index;  // of NaNs alone
  // An absent row is below all classes or, at a scale of 0 and among NaNs, one of equals.
  while (count && found < shape.classes - 1 && count[found] <= 0) ++found;
  label[image] = found;
}

static __global__ void __launch_bounds__(kGroup)
    normalise_kernel(float* rows,  // [B, D], overwritten
                     int64_t width) {
  float* row = rows + blockIdx.x * width;
  const float square = reduce<kGroup>(square_part<kGroup>(row, width), Sum());
  const float norm = fmaxf(sqrtf(square), kMinNorm);
  for (int64_t i = threadIdx.x; i < width; i += kGroup) row[i] /= norm;
}

// ---- mean_logits --------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kBlock)
    mean_units_kernel(const T* __restrict__ features,  // [L, B, D]
                      float* __restrict__ out,         // [B, D]
                      Shape shape, float factor) {
  __shared__ float norms[kMaxRows];
  const int64_t image = blockIdx.x;
  for (int base = 0; base < shape.views; base += kGroups) {
    const int view = base + threadIdx.x / kGroup;
    const bool active = view < shape.views;
    const T* row = active ? features + (view * shape.batch + image) * shape.width : nullptr;
    const float square = reduce<kGroup>(square_part<kGroup>(row, shape.width), Sum());
    if (active && threadIdx.x % kGroup == 0) norms[view] = fmaxf(sqrtf(square), kMinNorm);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < shape.width; i += kBlock) {
    float sum = 0.0f;
    for (int view = 0; view < shape.views; ++view) {
      sum += to_float(features[(view * shape.batch + image) * shape.width + i]) / norms[view];
    }
    out[image * shape.width + i] = factor * sum;
  }
}

// Lengths of the rows of one image, by a block of kGroup threads.
template <typename T>
__device__ __forceinline__ void row_norms(const T* __restrict__ features, const Shape& shape,
                                          int64_t image, float* norms) {
  for (int view = 0; view < shape.views; ++view) {
    const T* row = features + (view * shape.batch + image) * shape.width;
    const float square = reduce<kGroup>(square_part<kGroup>(row, shape.width), Sum());
    if (threadIdx.x == 0) norms[view] = fmaxf(sqrtf(square), kMinNorm);
  }
  __syncthreads();
}

// Of fewer threads, so that more registers are there for each.
template <typename T>
__global__ void __launch_bounds__(kGroup)
    weighted_units_kernel(const T* __restrict__ features,     // [L, B, D]
                          const float* __restrict__ weights,  // [L, B], or null: 1
                          float* __restrict__ out,            // [B, D]
                          Shape shape, float factor, bool unit) {
  __shared__ float norms[kMaxRows];
  const int64_t image = blockIdx.x;
  row_norms(features, shape, image, norms);
  float square = 0.0f;
  for (int64_t i = threadIdx.x; i < shape.width; i += kGroup) {
    float sum = 0.0f;
    for (int view = 0; view < shape.views; ++view) {
      const int64_t row = view * shape.batch + image;
      sum += (weights ? weights[row] : 1.0f) *
             (to_float(features[row * shape.width + i]) / norms[view]);
    }
    out[image * shape.width + i] = factor * sum;
    square += sum * sum;
  }
  if (!unit) return;
  const float size = sqrtf(reduce<kGroup>(square, Sum()));
  for (int64_t i = threadIdx.x; i < shape.width; i += kGroup) {
    float* to = out + image * shape.width + i;
    // Of a sum of zeros the first view stands alone.
    *to = size != 0.0f ? *to / fmaxf(size, kMinNorm)
                       : factor * (to_float(features[image * shape.width + i]) / norms[0]);
  }
}

// ---- view_weights -------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kGroup)
    view_weights_kernel(const T* __restrict__ features,  // [L, B, D]
                        float* __restrict__ mean,        // [B, D], scratch: m
                        float* __restrict__ weights,     // [L, B]
                        float* __restrict__ cosine,      // [B]
                        float* __restrict__ agreement,   // [B]
                        Shape shape, Extrapolation rule) {
  __shared__ float norms[kMaxRows];
  const int64_t image = blockIdx.x;
  const float count = static_cast<float>(shape.views - 1);
  row_norms(features, shape, image, norms);
  const T* own = features + image * shape.width;
  mean += image * shape.width;
  Pair first = {0.0f, 0.0f};  // <u_1, m>, |m|^2
  float along = 0.0f;         // |m - u_1|^2
  for (int64_t i = threadIdx.x; i < shape.width; i += kGroup) {
    float sum = 0.0f;
    for (int view = 1; view < shape.views; ++view) {
      sum +=
          to_float(features[(view * shape.batch + image) * shape.width + i]) / norms[view] / count;
    }
    mean[i] = sum;
    const float u = to_float(own[i]) / norms[0];
    first = Sum()(first, Pair{u * sum, sum * sum});
    along += (sum - u) * (sum - u);
  }
  first = reduce<kGroup>(first, Sum());
  along = sqrtf(reduce<kGroup>(along, Sum()));
  __syncthreads();
  const float a = first.first, size = fmaxf(sqrtf(first.second), kMinNorm), p = a / size;
  float off = 0.0f;
  for (int64_t i = threadIdx.x; i < shape.width; i += kGroup) {
    const float part = mean[i] / size - p * (to_float(own[i]) / norms[0]);
    off += part * part;
  }
  const float side = sqrtf(reduce<kGroup>(off, Sum()));
  float agreed = 0.0f;
  for (int view = 1; view < shape.views; ++view) {
    Pair drift = {0.0f, 0.0f};  // with m - u_1, |u_l - u_1|^2
    for (int64_t i = threadIdx.x; i < shape.width; i += kGroup) {
      const float u = to_float(own[i]) / norms[0];
      const float by =
          to_float(features[(view * shape.batch + image) * shape.width + i]) / norms[view] - u;
      drift = Sum()(drift, Pair{by * (mean[i] - u), by * by});
    }
    drift = reduce<kGroup>(drift, Sum());
    const float moved = sqrtf(drift.second);
    if (!(moved <= kStill)) agreed += drift.first / fmaxf(moved * along, kStill * kStill);
  }
  if (threadIdx.x != 0) return;
  agreed = within_one(agreed / count);
  cosine[image] = a;
  agreement[image] = agreed;
  const Shares found = shares(rule, a, agreed, size, side, count);
  weights[image] = found.first;
  for (int view = 1; view < shape.views; ++view) {
    weights[view * shape.batch + image] = found.rest / count;
  }
}

static __global__ void __launch_bounds__(kGroup)
    add_kernel(float* values, int64_t numel, float summand) {
  const int64_t stride = int64_t{gridDim.x} * kGroup;
  for (int64_t i = int64_t{blockIdx.x} * kGroup + threadIdx.x; i < numel; i += stride) {
    values[i] += summand;
  }
}

}  // namespace scc_fast
