// warp_views on the CPU. Pictures are first laid out with the colours of a pixel together: the
// pixels in a row that a point lies between are then one piece of memory, and their colours one
// vector, so that nothing is gathered.
#include "cpu/rows.h"

namespace scc_fast {
namespace {

constexpr int kColours = 4;  // red, green, blue, and what makes a vector of them
constexpr int kOutside = 6;  // as far as a pixel of a point can lie outside, as held() holds it

struct InterleaveJob {
  const float* x;  // [B, 3, height, width]
  float* out;      // [B, height, width, 4], less `fill`
  int64_t height, width;
  Colours fill;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = height * width;
      const float* SCC_RESTRICT from = x + (i / height * 3 * height + i % height) * width;
      float* SCC_RESTRICT to = out + i * width * kColours;
      for (int64_t k = 0; k < width; ++k) {
        for (int c = 0; c < 3; ++c) to[k * kColours + c] = from[c * plane + k] - fill.channel[c];
        to[k * kColours + 3] = 0.0f;
      }
    }
  }
};

SCC_DEFINE_RUN(InterleaveJob)

// Where the points of one row of a view lie in the picture: the first of N x N pixels of each, and
// the weights of its N columns and rows.
template <int N>
struct Points {
  std::vector<int32_t> column, row;
  std::vector<float> weights;
  int width;

  explicit Points(int64_t count)
      : column(count), row(count), weights(2 * N * count), width(static_cast<int>(count)) {}

  // Of the first `points` of them, `offset` right of the row's beginning and `down` in the view.
  SCC_INLINE void find(const float* m, const Limits& limits, float down, float offset, int points) {
    const float m0 = m[0], m3 = m[3], m6 = m[6];
    const float x = m[1] * down + m[2], y = m[4] * down + m[5], z = m[7] * down + m[8];
    const auto left = static_cast<float>(limits.left), top = static_cast<float>(limits.top);
    const auto last = static_cast<float>(limits.right), bottom = static_cast<float>(limits.bottom);
    const int count = width;
    int32_t* SCC_RESTRICT columns = column.data();
    int32_t* SCC_RESTRICT rows = row.data();
    float* SCC_RESTRICT shares = weights.data();
    float* SCC_RESTRICT heights = shares + N * count;
    for (int k = 0; k < points; ++k) {
      const float right = static_cast<float>(k) + offset, depth = m6 * right + z;
      const float across = held((m0 * right + x) / depth - 0.5f, left, last);
      const float along = held((m3 * right + y) / depth - 0.5f, top, bottom);
      const int first = whole_below(across), upper = whole_below(along);
      columns[k] = first - (N / 2 - 1);
      rows[k] = upper - (N / 2 - 1);
      const float s = across - static_cast<float>(first), t = along - static_cast<float>(upper);
      shares[k] = tap_weight<N>(0, s);
      heights[k] = tap_weight<N>(0, t);
      shares[count + k] = tap_weight<N>(1, s);
      heights[count + k] = tap_weight<N>(1, t);
      if (N == 4) {
        shares[2 * count + k] = tap_weight<N>(2, s);
        heights[2 * count + k] = tap_weight<N>(2, t);
        shares[3 * count + k] = tap_weight<N>(3, s);
        heights[3 * count + k] = tap_weight<N>(3, t);
      }
    }
  }
};

struct WarpJob {
  const float* pixels;     // [B, height, width, 4], less the fill
  const float* matrix;     // [V, B, 3, 3]
  const int64_t* box;      // [V, B, 4] or null
  const int64_t* samples;  // [V, B] or null
  int64_t batch, height, width;
  Frame view;  // one view of one image
  bool cubic, filled;
  Colours fill, mean, std;
  void* out;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    if (cubic) {
      return rows_of<Number, 4>(begin, end);
    }
    rows_of<Number, 2>(begin, end);
  }

  template <class Number, int N>
  SCC_INLINE void rows_of(int64_t begin, int64_t end) const;
  template <int N>
  SCC_INLINE void add_row(const float* image, const Limits limits, const Points<N>& points,
                          float* line) const;
  template <int N>
  SCC_INLINE void add_level_row(const float* image, const Limits limits, const Points<N>& points,
                                float* mixed, float* line) const;
  template <class Number>
  SCC_INLINE void write_row(int64_t pair, int64_t row, float share, const float* line,
                            typename Number::Stored* buffer) const;
};

// to += the N x N pixels from `from` on, rows `stride` apart, weighted: down first.
template <int N>
SCC_INLINE void add_blend(const float* SCC_RESTRICT from, int64_t stride, const float (&across)[N],
                          const float (&down)[N], float* SCC_RESTRICT to) {
  constexpr int kRow = N * kColours;
  float sum[kRow];
  for (int i = 0; i < kRow; ++i) sum[i] = down[0] * from[i];
  for (int r = 1; r < N; ++r) {
    for (int i = 0; i < kRow; ++i) sum[i] += down[r] * from[r * stride + i];
  }
  float total[kColours];
  for (int c = 0; c < kColours; ++c) total[c] = across[0] * sum[c];
  for (int j = 1; j < N; ++j) {
    for (int c = 0; c < kColours; ++c) total[c] += across[j] * sum[j * kColours + c];
  }
  for (int c = 0; c < kColours; ++c) to[c] += total[c];
}

// line [width, 4] += the picture at the points of a row.
template <int N>
SCC_INLINE void WarpJob::add_row(const float* SCC_RESTRICT image, const Limits limits,
                                 const Points<N>& points, float* SCC_RESTRICT line) const {
  const int64_t stride = width * kColours;
  const int count = points.width;
  const bool cut = filled;
  const int32_t* SCC_RESTRICT columns = points.column.data();
  const int32_t* SCC_RESTRICT rows = points.row.data();
  const float* SCC_RESTRICT weights = points.weights.data();
  // Of the first pixel: so many more do all of them lie inside.
  const int wide = limits.right - limits.left + 2 - N, tall = limits.bottom - limits.top + 2 - N;
  for (int k = 0; k < count; ++k) {
    const int column = columns[k], row = rows[k];
    const int beside = column - limits.left, above = row - limits.top;
    float across[N], down[N];
    for (int j = 0; j < N; ++j) {
      across[j] = weights[j * count + k];
      down[j] = weights[(N + j) * count + k];
    }
    float* to = line + k * kColours;
    if ((beside >= 0) & (beside < wide) & (above >= 0) & (above < tall)) {
      add_blend<N>(image + row * stride + column * kColours, stride, across, down, to);
      continue;
    }
    if (cut && (beside <= -N || above <= -N || column > limits.right || row > limits.bottom)) {
      continue;
    }
    float around[N * N * kColours] = {};
    for (int r = 0; r < N; ++r) {
      for (int j = 0; j < N; ++j) {
        const int y = clamp_whole(row + r, limits.top, limits.bottom);
        const int x = clamp_whole(column + j, limits.left, limits.right);
        if (cut && (y != row + r || x != column + j)) continue;
        std::copy_n(image + y * stride + x * kColours, kColours, around + (r * N + j) * kColours);
      }
    }
    add_blend<N>(around, N * kColours, across, down, to);
  }
}

// The same where a row of the view lies along a row of the picture, as in crops: the rows of the
// picture are blended once, into `mixed`, for all of it. To the bit the same.
template <int N>
SCC_INLINE void WarpJob::add_level_row(const float* SCC_RESTRICT image, const Limits limits,
                                       const Points<N>& points, float* SCC_RESTRICT mixed,
                                       float* SCC_RESTRICT line) const {
  const int count = points.width, seen = limits.right - limits.left + 1;
  const int32_t* SCC_RESTRICT columns = points.column.data();
  const float* SCC_RESTRICT across = points.weights.data();
  float* SCC_RESTRICT middle = mixed + kOutside * kColours;
  for (int r = 0; r < N; ++r) {
    const int row = points.row[0] + r, y = clamp_whole(row, limits.top, limits.bottom);
    const float weight = filled && y != row ? 0.0f : across[(N + r) * count];
    const float* SCC_RESTRICT from = image + (y * width + limits.left) * kColours;
    if (r == 0) {
      for (int i = 0; i < seen * kColours; ++i) middle[i] = weight * from[i];
    } else {
      for (int i = 0; i < seen * kColours; ++i) middle[i] += weight * from[i];
    }
  }
  for (int i = 0; i < kOutside * kColours; ++i) {
    mixed[i] = filled ? 0.0f : middle[i % kColours];
    middle[seen * kColours + i] = filled ? 0.0f : middle[(seen - 1) * kColours + i % kColours];
  }
  const float* SCC_RESTRICT zero = middle - limits.left * kColours;
  for (int k = 0; k < count; ++k) {
    const float* from = zero + columns[k] * kColours;
    float total[kColours];
    for (int c = 0; c < kColours; ++c) total[c] = across[k] * from[c];
    for (int j = 1; j < N; ++j) {
      for (int c = 0; c < kColours; ++c) total[c] += across[j * count + k] * from[j * kColours + c];
    }
    for (int c = 0; c < kColours; ++c) line[k * kColours + c] += total[c];
  }
}

// One row of a view: clamped where weights can be negative, normalised, in the view's order.
template <class Number>
SCC_INLINE void WarpJob::write_row(int64_t pair, int64_t row, float share, const float* line,
                                   typename Number::Stored* buffer) const {
  const int64_t count = view.covered_width();
  for (int c = 0; c < 3; ++c) {
    const Row at(c * view.height + row, view.height);
    const Segments place = segments(view, pair, at, row);
    auto* const there = static_cast<typename Number::Stored*>(out) + place.first;
    typename Number::Stored* SCC_RESTRICT to = place.step ? buffer : there;
    const float base = fill.channel[c], middle = mean.channel[c], deviation = std.channel[c];
    const float low = cubic ? 0.0f : -HUGE_VALF, high = cubic ? 1.0f : HUGE_VALF;
    if (middle == 0.0f && deviation == 1.0f) {  // nothing to divide
      for (int64_t k = 0; k < count; ++k) {
        to[k] = Number::store(clamp(line[k * kColours + c] * share + base, low, high));
      }
    } else {
      for (int64_t k = 0; k < count; ++k) {
        const float pixel = clamp(line[k * kColours + c] * share + base, low, high);
        to[k] = Number::store(normalise(pixel, middle, deviation));
      }
    }
    for (int64_t i = 0; place.step && i < view.across(); ++i) {
      std::copy_n(to + i * place.width, place.width, there + i * place.step);
    }
  }
}

template <class Number, int N>
SCC_INLINE void WarpJob::rows_of(int64_t begin, int64_t end) const {
  const int64_t tall = view.covered_height(), wide = view.covered_width();
  Points<N> points(wide);
  std::vector<float> line(wide * kColours), mixed((width + 2 * kOutside) * kColours);
  int64_t known = -1;  // whose columns are in `points`
  std::vector<typename Number::Stored> buffer(wide);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pair = i / tall, row = i % tall;
    const float* image = pixels + pair % batch * height * width * kColours;
    const Limits limits = limits_of(box ? box + 4 * pair : nullptr, static_cast<int>(height),
                                    static_cast<int>(width));
    const int n = samples ? clamp_whole(samples[pair], 1, kMostSamples) : 1;
    std::fill(line.begin(), line.end(), 0.0f);
    const float* m = matrix + 9 * pair;
    const bool level = m[1] == 0.0f && m[3] == 0.0f && m[6] == 0.0f && m[7] == 0.0f;
    for (int s = 0; s < n * n; ++s) {
      const auto side = static_cast<float>(n);
      const float down = static_cast<float>(row) + (static_cast<float>(s / n) + 0.5f) / side;
      const float offset = (static_cast<float>(s % n) + 0.5f) / side;
      if (level) {
        points.find(m, limits, down, offset, pair == known && n == 1 ? 1 : points.width);
        add_level_row<N>(image, limits, points, mixed.data(), line.data());
      } else {
        points.find(m, limits, down, offset, points.width);
        add_row<N>(image, limits, points, line.data());
      }
    }
    known = pair;
    write_row<Number>(pair, row, 1.0f / static_cast<float>(n * n), line.data(), buffer.data());
  }
}

SCC_DEFINE_RUN(WarpJob)

Tensor whole_numbers(const char* rule, const Tensor& given, const Tensor& matrix, int64_t last) {
  check(given.scalar_type() == ScalarType::Long && given.is_cpu() &&
            given.dim() == (last > 1 ? 3 : 2) && given.size(0) == matrix.size(0) &&
            given.size(1) == matrix.size(1) && (last == 1 || given.size(2) == last),
        "warp_views", rule);
  return torch::stable::contiguous(given);
}

Tensor warp_views(const Tensor& x,                       // [B, 3, H, W]
                  const Tensor& matrix,                  // [V, B, 3, 3]
                  const std::optional<Tensor>& box,      // [V, B, 4]
                  const std::optional<Tensor>& samples,  // [V, B]
                  const std::vector<int64_t>& size, bool cubic, const std::vector<double>& fill,
                  const std::vector<double>& mean, const std::vector<double>& std, ScalarType dtype,
                  int64_t patch) {
  const char* op = "warp_views";
  check(x.scalar_type() == ScalarType::Float && x.is_cpu(), op, "x must be a float32 CPU tensor");
  check(x.dim() == 4 && x.size(1) == 3 && x.size(2) > 0 && x.size(3) > 0 &&
            x.size(2) * x.size(3) < int64_t{1} << 29,
        op, "x must be (B, 3, H, W) with pixels, fewer than 2^29");
  check(matrix.scalar_type() == ScalarType::Float && matrix.is_cpu() && matrix.dim() == 4 &&
            matrix.size(0) > 0 && matrix.size(1) == x.size(0) && matrix.size(2) == 3 &&
            matrix.size(3) == 3,
        op, "matrix must be a float32 CPU tensor (V, B, 3, 3)");
  check(
      size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < INT32_MAX && size[1] < INT32_MAX,
      op, "size must be two numbers above 0");
  check(patch >= 0 && patch <= std::min(size[0], size[1]), op, "patch must be in [0, min(size)]");
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        op, "dtype must be float32, float16 or bfloat16");
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const Colours base =
      fill.empty() ? Colours{} : read_colours(op, "fill must be three numbers or none", fill);
  const Tensor from = torch::stable::contiguous(x), maps = torch::stable::contiguous(matrix);
  std::optional<Tensor> boxes, counts;
  if (box) boxes = whole_numbers("box must be an int64 CPU tensor (V, B, 4)", *box, matrix, 4);
  if (samples) {
    counts = whole_numbers("samples must be an int64 CPU tensor (V, B)", *samples, matrix, 1);
  }
  const auto numbers = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const int64_t*>(tensor->const_data_ptr()) : nullptr;
  };
  const Tensor pixels = torch::stable::new_empty(x, {batch, height, width, kColours});
  const InterleaveJob interleave{static_cast<const float*>(from.const_data_ptr()),
                                 static_cast<float*>(pixels.mutable_data_ptr()), height, width,
                                 base};
  run(interleave, ScalarType::Float, batch * height, 1 + 16384 / (width + 1));

  const Frame view{1, size[0], size[1], patch, {}, Tensor(), Tensor(), {}};
  const int64_t pairs = matrix.size(0) * batch;
  const int64_t cells = patch ? size[0] / patch * view.across() : 0;
  Tensor out =
      torch::stable::new_empty(x,
                               patch ? std::vector<int64_t>{pairs, cells, 3 * patch * patch}
                                     : std::vector<int64_t>{pairs, 3, size[0], size[1]},
                               dtype);
  const WarpJob job{static_cast<const float*>(pixels.const_data_ptr()),
                    static_cast<const float*>(maps.const_data_ptr()),
                    numbers(boxes),
                    numbers(counts),
                    batch,
                    height,
                    width,
                    view,
                    cubic,
                    !fill.empty(),
                    base,
                    read_colours(op, "mean must be three numbers", mean),
                    read_colours(op, "std must be three numbers", std),
                    out.mutable_data_ptr()};
  prefer_large_pages(job.out, out.numel() * out.element_size());
  run(job, dtype, pairs * view.covered_height(), 1 + 4096 / (size[1] + 1));
  return out;
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("warp_views", TORCH_BOX(&scc_fast::warp_views));
}
