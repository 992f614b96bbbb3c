// A batch seen as rows of pixels, and where the rows of its views lie: what make_views, its
// adjoint, pgd_step_ and warp_views share on the CPU.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/random.h"
#include "cpu/simd.h"
#include "pixel_math.h"
#include "tensor.h"

namespace scc_fast {

// Pictures [B, 3, H, W] and L views of each: [L * B, 3, H, W], or patch by patch.
struct Frame {
  int64_t batch, height, width;
  int64_t patch;  // 0: whole pictures
  std::vector<View> views;
  Tensor seeds, x;  // contiguous
  std::optional<Tensor> delta;

  int64_t across() const { return patch ? width / patch : 1; }  // patches in a row of them
  // What the patches cover, from the upper left corner.
  int64_t covered_width() const { return patch ? across() * patch : width; }
  int64_t covered_height() const { return patch ? height / patch * patch : height; }
  int64_t elements() const { return 3 * covered_height() * covered_width(); }  // of one view
  int64_t rows() const { return batch * 3 * height; }
  int64_t grain() const { return 1 + 16384 / (width + 1); }  // rows that a thread takes at least
};

// Reads the arguments that the three ops have in common, and checks them.
Frame read_frame(const char* op, const Tensor& x, const std::optional<Tensor>& delta,
                 const Tensor& seeds, const std::vector<int64_t>& plan,
                 const std::vector<double>& noise, int64_t patch);

// The gradient of the views, contiguous.
Tensor read_gradient(const char* op, const Tensor& gradient, const Frame& frame);

// The first write to fresh memory faults page by page, which can cost more than the views
// themselves: large results ask for large pages.
inline void prefer_large_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

struct Colours {
  float channel[3];
};

inline Colours read_colours(const char* op, const char* rule, const std::vector<double>& values) {
  check(values.size() == 3, op, rule);
  return {{static_cast<float>(values[0]), static_cast<float>(values[1]),
           static_cast<float>(values[2])}};
}

// Raw pointers of a Frame: what the rows work with.
struct Pixels {
  const int64_t* seeds;
  const float* x;
  const float* delta;  // or null

  explicit Pixels(const Frame& frame)
      : seeds(static_cast<const int64_t*>(frame.seeds.const_data_ptr())),
        x(static_cast<const float*>(frame.x.const_data_ptr())),
        delta(frame.delta ? static_cast<const float*>(frame.delta->const_data_ptr()) : nullptr) {}

  // out = x + delta.
  SCC_INLINE void load(int64_t offset, int64_t width, float* SCC_RESTRICT out) const {
    for (int64_t i = 0; i < width; ++i) out[i] = x[offset + i];
    if (!delta) return;
    for (int64_t i = 0; i < width; ++i) out[i] += delta[offset + i];
  }
};

// One row of one channel of one image.
struct Row {
  int64_t image, channel, row;

  SCC_INLINE Row(int64_t index, int64_t height)
      : image(index / (3 * height)), channel(index / height % 3), row(index % height) {}
};

// Where a row of a view lies: `width` elements at a time, `step` apart.
struct Segments {
  int64_t first, width, step;
};

SCC_INLINE Segments segments(const Frame& frame, int64_t view, const Row& at, int64_t view_row) {
  const int64_t base = (view * frame.batch + at.image) * frame.elements();
  const int64_t p = frame.patch;
  if (!p) return {base + (at.channel * frame.height + view_row) * frame.width, frame.width, 0};
  const int64_t cell = 3 * p * p;
  return {base + view_row / p * frame.across() * cell + (at.channel * p + view_row % p) * p, p,
          cell};
}

// The noise of one row of a view, in `buffer`: a row need not start on one of Philox's blocks.
SCC_INLINE const float* noise_row(const Frame& frame, int64_t seed, int64_t view, const Row& at,
                                  int64_t view_row, std::vector<float>& buffer) {
  const int64_t element = (at.channel * frame.height + view_row) * frame.width;
  buffer.resize(frame.width + 4);
  fill_normal(buffer.data(), frame.width + element % 4, seed, element / 4,
              static_cast<uint32_t>(view), kViewNoise);
  return buffer.data() + element % 4;
}

// The columns [begin, end) of the picture that a view shows within its first `covered` columns.
struct Span {
  int64_t begin, end;
};

SCC_INLINE Span shown(const View& view, int64_t width, int64_t covered) {
  const int64_t low = view.flip ? width - covered : 0;  // of the shifted picture
  const int64_t high = view.flip ? width : covered;
  const int64_t begin = std::clamp<int64_t>(low - view.right, 0, width);
  return {begin, std::clamp<int64_t>(high - view.right, begin, width)};
}

template <class Number>
struct GatherBuffers {
  std::vector<float> sum, bare, noise;
  std::vector<typename Number::Stored> line;

  explicit GatherBuffers(int64_t width) : sum(width), bare(width), line(width) {}
};

// buffers.sum = the sum over the views, in order, of the gradient of one row of the picture.
template <class Number>
SCC_INLINE void gather_row(const Frame& frame, const Pixels& pixels, const void* gradient,
                           const Row& at, GatherBuffers<Number>& buffers) {
  const int64_t width = frame.width, covered = frame.covered_width();
  const int64_t offset = ((at.image * 3 + at.channel) * frame.height + at.row) * width;
  float* SCC_RESTRICT sum = buffers.sum.data();
  std::fill(sum, sum + width, 0.0f);
  for (size_t index = 0; index < frame.views.size(); ++index) {
    const View& view = frame.views[index];
    const int64_t view_row = at.row + view.down;
    if (view_row < 0 || view_row >= frame.covered_height()) continue;
    const Segments place = segments(frame, index, at, view_row);
    const auto* line = static_cast<const typename Number::Stored*>(gradient) + place.first;
    if (place.step) {
      for (int64_t i = 0; i < frame.across(); ++i) {
        std::copy_n(line + i * place.step, place.width, buffers.line.data() + i * place.width);
      }
      line = buffers.line.data();
    }
    const Span span = shown(view, width, covered);
    const int64_t zero = view_column(view, 0, width);  // the column that shows column 0
    if (view.noise > 0.0f) {
      float* SCC_RESTRICT bare = buffers.bare.data();
      pixels.load(offset, width, bare);
      const float* normal =
          noise_row(frame, pixels.seeds[at.image], index, at, view_row, buffers.noise);
      for (int64_t i = span.begin; i < span.end; ++i) {
        const int64_t column = view.flip ? zero - i : zero + i;
        const bool passes = in_box(add_noise(bare[i], view.noise, normal[column]));
        sum[i] += passes ? Number::load(line[column]) : 0.0f;
      }
    } else if (view.flip) {
      // Upwards in memory, which processors prefetch best; the sum lies in the cache.
      const int64_t last = zero - span.begin;
      for (int64_t column = zero - span.end + 1; column <= last; ++column) {
        sum[zero - column] += Number::load(line[column]);
      }
    } else {
      for (int64_t i = span.begin; i < span.end; ++i) sum[i] += Number::load(line[zero + i]);
    }
  }
}

}  // namespace scc_fast
