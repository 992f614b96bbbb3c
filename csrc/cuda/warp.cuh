// The kernel of warp_views. No torch header.
//
// Within one image positions fit in 31 bits (the callers check); across images they are int64.
#pragma once

#include "cuda/vector.cuh"

namespace scc_fast {

constexpr int kWarpThreads = 256;

// A picture, and its views as cells: patches row by row, or one cell that is all of a view.
struct Warp {
  int height, width;       // of the picture
  int cells, across;       // of a view, and of these in a row
  int cell_height, plane;  // plane: pixels of a cell
  Divisor by_plane, by_cell_width, by_across;
  bool filled;
  float fill[3], mean[3], std[3];
};

inline Warp warp_of(int64_t height, int64_t width, int64_t tall, int64_t wide, int64_t patch) {
  Warp warp = {};
  warp.height = static_cast<int>(height);
  warp.width = static_cast<int>(width);
  const int64_t cell_height = patch ? patch : tall, cell_width = patch ? patch : wide;
  warp.across = static_cast<int>(wide / cell_width);
  warp.cells = static_cast<int>(tall / cell_height * warp.across);
  warp.cell_height = static_cast<int>(cell_height);
  warp.plane = static_cast<int>(cell_height * cell_width);
  warp.by_plane = Divisor(warp.plane);
  warp.by_cell_width = Divisor(cell_width);
  warp.by_across = Divisor(warp.across);
  return warp;
}

// The N indices along one axis around a position, and their weights; without weight where they are
// outside and something fills that.
template <int N>
SCC_HOST_DEVICE void taps(float position, int first, int last, bool filled, int* index,
                          float* weight) {
  const float there = held(position, static_cast<float>(first), static_cast<float>(last));
  const int below = whole_below(there);
  for (int k = 0; k < N; ++k) {
    const int at = below + k - (N / 2 - 1);
    const bool inside = at >= first && at <= last;
    weight[k] = filled && !inside ? 0.0f : tap_weight<N>(k, there - static_cast<float>(below));
    index[k] = clamp_whole(at, first, last);
  }
}

// total += the picture [3, height, width], less the fill, at one point: down first.
template <int N>
SCC_HOST_DEVICE void add_point(const float* x, const float* m, const Limits& limits,
                               const Warp& warp, float right, float down, float* total) {
  const float depth = m[6] * right + (m[7] * down + m[8]);
  const float across = (m[0] * right + (m[1] * down + m[2])) / depth - 0.5f;
  const float along = (m[3] * right + (m[4] * down + m[5])) / depth - 0.5f;
  int column[N], row[N];
  float share[N], weight[N];
  taps<N>(across, limits.left, limits.right, warp.filled, column, share);
  taps<N>(along, limits.top, limits.bottom, warp.filled, row, weight);
  for (int c = 0; c < 3; ++c, x += int64_t{warp.height} * warp.width) {
    float value = 0.0f;
    for (int j = 0; j < N; ++j) {
      float part = 0.0f;
      for (int r = 0; r < N; ++r) {
        part += weight[r] * (__ldg(x + row[r] * warp.width + column[j]) - warp.fill[c]);
      }
      value += share[j] * part;
    }
    total[c] += value;
  }
}

// A thread makes the three colours of a pixel, in the order of a cell. Views of images lie along y.
template <typename T, int N>
__global__ void __launch_bounds__(kWarpThreads)
    warp_kernel(const float* __restrict__ x,          // [B, 3, height, width]
                const float* __restrict__ matrix,     // [V, B, 3, 3]
                const int64_t* __restrict__ box,      // [V, B, 4] or null
                const int64_t* __restrict__ samples,  // [V, B] or null
                T* __restrict__ out,                  // [V, B, cells, 3, plane]
                int64_t pairs, int64_t batch, const __grid_constant__ Warp warp) {
  const auto pixels = static_cast<uint32_t>(warp.cells) * static_cast<uint32_t>(warp.plane);
  const uint32_t first = blockIdx.x * kWarpThreads + threadIdx.x;
  const uint32_t stride = gridDim.x * kWarpThreads;
  for (int64_t pair = blockIdx.y; pair < pairs; pair += gridDim.y) {
    const Limits limits = limits_of(box ? box + 4 * pair : nullptr, warp.height, warp.width);
    const int n = samples ? clamp_whole(samples[pair], 1, kMostSamples) : 1;
    const float side = static_cast<float>(n), share = 1.0f / static_cast<float>(n * n);
    const float* picture = x + pair % batch * 3 * warp.height * warp.width;
    for (uint32_t pixel = first; pixel < pixels; pixel += stride) {
      const uint32_t cell = pixel / warp.by_plane, inner = pixel - cell * warp.by_plane.value;
      const uint32_t i = inner / warp.by_cell_width, above = cell / warp.by_across;
      const uint32_t j = inner - i * warp.by_cell_width.value;
      const uint32_t beside = cell - above * warp.by_across.value;
      const auto row = static_cast<float>(above * warp.cell_height + i);
      const auto column = static_cast<float>(beside * warp.by_cell_width.value + j);
      float total[3] = {};
      for (int s = 0; s < n * n; ++s) {
        const float down = row + (static_cast<float>(s / n) + 0.5f) / side;
        const float right = column + (static_cast<float>(s % n) + 0.5f) / side;
        add_point<N>(picture, matrix + 9 * pair, limits, warp, right, down, total);
      }
      T* to = out + (pair * warp.cells + cell) * 3 * warp.plane + inner;
      for (int c = 0; c < 3; ++c, to += warp.plane) {
        const float value = total[c] * share + warp.fill[c];
        *to = from_float<T>(
            normalise(N == 4 ? clamp(value, 0.0f, 1.0f) : value, warp.mean[c], warp.std[c]));
      }
    }
  }
}

}  // namespace scc_fast
