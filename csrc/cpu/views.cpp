// make_views and its adjoint on the CPU: each row of x and delta is read once, each row of a view
// is written once.
#include "cpu/rows.h"

namespace scc_fast {

Frame read_frame(const char* op, const Tensor& x, const std::optional<Tensor>& delta,
                 const Tensor& seeds, const std::vector<int64_t>& plan,
                 const std::vector<double>& noise, int64_t patch) {
  check(x.scalar_type() == ScalarType::Float && x.is_cpu(), op, "x must be a float32 CPU tensor");
  check(x.dim() == 4 && x.size(1) == 3, op, "x must be (B, 3, H, W)");
  if (delta) {
    check(delta->scalar_type() == ScalarType::Float && delta->is_cpu(), op,
          "delta must be a float32 CPU tensor");
    check(delta->dim() == 4 && delta->sizes().equals(x.sizes()), op,
          "delta must have the shape of x");
  }
  check(seeds.scalar_type() == ScalarType::Long && seeds.is_cpu(), op,
        "seeds must be an int64 CPU tensor");
  check(seeds.dim() == 1 && seeds.size(0) == x.size(0), op, "seeds must be (B,)");
  check(!noise.empty(), op, "plan must hold at least one view");
  check_noise(op, noise);
  check(plan.size() == 3 * noise.size(), op, "plan must hold three numbers for each of noise");
  check(patch >= 0 && patch <= std::min(x.size(2), x.size(3)), op,
        "patch must be in [0, min(H, W)]");
  Frame frame{x.size(0),
              x.size(2),
              x.size(3),
              patch,
              {},
              torch::stable::contiguous(seeds),
              torch::stable::contiguous(x),
              {}};
  if (delta) frame.delta = torch::stable::contiguous(*delta);
  for (size_t i = 0; i < noise.size(); ++i) {
    // A shift past the picture shows nothing of it, however far.
    const int64_t down = std::clamp(plan[3 * i + 1], -frame.height, frame.height);
    const int64_t right = std::clamp(plan[3 * i + 2], -frame.width, frame.width);
    frame.views.push_back({down, right, plan[3 * i] != 0, static_cast<float>(noise[i])});
  }
  return frame;
}

Tensor read_gradient(const char* op, const Tensor& gradient, const Frame& frame) {
  const ScalarType type = gradient.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
        "gradient must be float32, float16 or bfloat16");
  check(gradient.is_cpu(), op, "gradient must be a CPU tensor");
  const int64_t images = static_cast<int64_t>(frame.views.size()) * frame.batch;
  const bool fits = gradient.numel() == images * frame.elements() && gradient.dim() > 0 &&
                    gradient.size(0) == images;
  check(fits, op, "gradient must have the shape of make_views' result");
  return torch::stable::contiguous(gradient);
}

namespace {

// A row of the picture as a view shows it: shifted, then flipped; `fill` where nothing is shown.
template <class T>
SCC_INLINE void place_row(const View& view, int64_t width, const T* SCC_RESTRICT from, T fill,
                          T* SCC_RESTRICT to) {
  const Span span = shown(view, width, width);
  const int64_t zero = view_column(view, 0, width);
  if (view.flip) {
    const int64_t first = zero - (span.end - 1), count = span.end - span.begin;
    std::fill(to, to + (count ? first : width), fill);
    for (int64_t i = 0; i < count; ++i) to[first + i] = from[span.end - 1 - i];
    if (count) std::fill(to + first + count, to + width, fill);
  } else {
    const int64_t first = zero + span.begin, count = span.end - span.begin;
    std::fill(to, to + (count ? first : width), fill);
    std::copy_n(from + span.begin, count, to + first);
    if (count) std::fill(to + first + count, to + width, fill);
  }
}

// Buffers of one thread.
template <class Stored>
struct Buffers {
  std::vector<float> bare, line, noise;
  std::vector<Stored> shown, stored;

  explicit Buffers(int64_t width) : bare(width), line(width), shown(width), stored(width) {}
};

struct ViewsJob {
  const Frame& frame;
  Colours fill, mean, std;
  void* out;

  template <class Number>
  SCC_INLINE void write_row(const Pixels& pixels, int64_t index, const Row& at, int64_t view_row,
                            bool covered, Buffers<typename Number::Stored>& buffer) const;
  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const;
};

// One row of a view from the picture's row that it shows, or from none.
template <class Number>
SCC_INLINE void ViewsJob::write_row(const Pixels& pixels, int64_t index, const Row& at,
                                    int64_t view_row, bool covered,
                                    Buffers<typename Number::Stored>& buffer) const {
  using Stored = typename Number::Stored;
  const View& view = frame.views[index];
  const int64_t width = frame.width;
  const float mean = this->mean.channel[at.channel], std = this->std.channel[at.channel];
  const float fill = this->fill.channel[at.channel];
  const Segments place = segments(frame, index, at, view_row);
  Stored* const there = static_cast<Stored*>(out) + place.first;
  Stored* const to = place.step ? buffer.stored.data() : there;
  if (view.noise > 0.0f) {
    float* SCC_RESTRICT line = buffer.line.data();
    if (covered) {
      place_row(view, width, buffer.bare.data(), fill, line);
    } else {
      std::fill(line, line + width, fill);
    }
    const float* normal =
        noise_row(frame, pixels.seeds[at.image], index, at, view_row, buffer.noise);
    for (int64_t i = 0; i < width; ++i) {
      const float noisy = clamp(add_noise(line[i], view.noise, normal[i]), 0.0f, 1.0f);
      to[i] = Number::store(normalise(noisy, mean, std));
    }
  } else if (covered) {
    place_row(view, width, buffer.shown.data(), Number::store(normalise(fill, mean, std)), to);
  } else {
    std::fill(to, to + width, Number::store(normalise(fill, mean, std)));
  }
  for (int64_t i = 0; place.step && i < frame.across(); ++i) {
    std::copy_n(to + i * place.width, place.width, there + i * place.step);
  }
}

template <class Number>
SCC_INLINE void ViewsJob::rows(int64_t begin, int64_t end) const {
  const Pixels pixels(frame);
  Buffers<typename Number::Stored> buffer(frame.width);
  for (int64_t i = begin; i < end; ++i) {
    const Row at(i, frame.height);
    const float mean = this->mean.channel[at.channel], std = this->std.channel[at.channel];
    pixels.load(i * frame.width, frame.width, buffer.bare.data());
    const float* SCC_RESTRICT bare = buffer.bare.data();
    typename Number::Stored* SCC_RESTRICT shown = buffer.shown.data();
    for (int64_t k = 0; k < frame.width; ++k) {
      shown[k] = Number::store(normalise(bare[k], mean, std));
    }
    for (size_t index = 0; index < frame.views.size(); ++index) {
      const int64_t down = frame.views[index].down;
      const int64_t view_row = at.row + down;
      if (view_row >= 0 && view_row < frame.covered_height()) {
        write_row<Number>(pixels, index, at, view_row, true, buffer);
      }
      const bool bare_row = at.row - down < 0 || at.row - down >= frame.height;
      if (bare_row && at.row < frame.covered_height()) {  // this row of the view shows nothing
        write_row<Number>(pixels, index, at, at.row, false, buffer);
      }
    }
  }
}

SCC_DEFINE_RUN(ViewsJob)

Tensor make_views(const Tensor& x,                     // [B, 3, H, W]
                  const std::optional<Tensor>& delta,  // like x
                  const Tensor& seeds,                 // [B]
                  const std::vector<int64_t>& plan, const std::vector<double>& noise,
                  const std::vector<double>& fill, const std::vector<double>& mean,
                  const std::vector<double>& std, ScalarType dtype, int64_t patch) {
  const Frame frame = read_frame("make_views", x, delta, seeds, plan, noise, patch);
  ViewsJob job{frame, read_colours("make_views", "fill must be three numbers", fill),
               read_colours("make_views", "mean must be three numbers", mean),
               read_colours("make_views", "std must be three numbers", std), nullptr};
  const int64_t images = static_cast<int64_t>(noise.size()) * frame.batch;
  const int64_t cells = patch ? frame.height / patch * frame.across() : 0;
  const std::vector<int64_t> shape =
      patch ? std::vector<int64_t>{images, cells, 3 * patch * patch}
            : std::vector<int64_t>{images, 3, frame.height, frame.width};
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        "make_views", "dtype must be float32, float16 or bfloat16");
  Tensor out = torch::stable::new_empty(x, shape, dtype);
  job.out = out.mutable_data_ptr();
  prefer_large_pages(job.out, out.numel() * out.element_size());
  run(job, dtype, frame.rows(), frame.grain());
  return out;
}

struct AdjointJob {
  const Frame& frame;
  Colours std;
  const void* gradient;
  float* out;

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const int64_t width = frame.width;
    const Pixels pixels(frame);
    GatherBuffers<Number> buffers(width);
    for (int64_t i = begin; i < end; ++i) {
      const Row at(i, frame.height);
      gather_row<Number>(frame, pixels, gradient, at, buffers);
      const float* SCC_RESTRICT sum = buffers.sum.data();
      float* SCC_RESTRICT to = out + i * width;
      for (int64_t k = 0; k < width; ++k) to[k] = sum[k] / std.channel[at.channel];
    }
  }
};

SCC_DEFINE_RUN(AdjointJob)

Tensor make_views_adjoint(const Tensor& gradient,  // [L * B, …]
                          const Tensor& x, const std::optional<Tensor>& delta, const Tensor& seeds,
                          const std::vector<int64_t>& plan, const std::vector<double>& noise,
                          const std::vector<double>& std, int64_t patch) {
  const char* op = "make_views_adjoint";
  const Frame frame = read_frame(op, x, delta, seeds, plan, noise, patch);
  const Tensor rows = read_gradient(op, gradient, frame);
  const Colours deviation = read_colours(op, "std must be three numbers", std);
  Tensor out = torch::stable::new_empty(x, {frame.batch, 3, frame.height, frame.width});
  const AdjointJob job{frame, deviation, rows.const_data_ptr(),
                       static_cast<float*>(out.mutable_data_ptr())};
  run(job, rows.scalar_type(), frame.rows(), frame.grain());
  return out;
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("make_views", TORCH_BOX(&scc_fast::make_views));
  m.impl("make_views_adjoint", TORCH_BOX(&scc_fast::make_views_adjoint));
}
