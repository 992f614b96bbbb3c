// drift_head, pseudo_label, margin_head, mean_logits and view_weights on the CPU: the matrix
// products are a library's, all that stands around them is one pass over each row.
#include <optional>
#include <tuple>

#include "cpu/features.h"
#include "extrapolation.h"

namespace scc_fast {
namespace {

// ---- Drift --------------------------------------------------------------------------------------

struct DriftJob {
  const Features& features;
  const void* anchor;  // [B, D]
  float* tau;          // [B]
  void* gradient;      // [L, B, D]

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const int64_t width = features.width;
    const float views = static_cast<float>(features.views);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i % features.batch;
      const auto* SCC_RESTRICT from = features.row<Number>(i / features.batch, image);
      const auto* SCC_RESTRICT fixed =
          static_cast<const typename Number::Stored*>(anchor) + image * width;
      auto* SCC_RESTRICT to = static_cast<typename Number::Stored*>(gradient) + i * width;
      for (int64_t k = 0; k < width; ++k) {
        to[k] = Number::store(2.0f * (Number::load(from[k]) - Number::load(fixed[k])) / views);
      }
      if (i >= features.batch) continue;  // the drift is the first view's
      const float moved = in_lanes(width, 0.0f, [&](float& sum, int64_t k) {
                            const float by = Number::load(from[k]) - Number::load(fixed[k]);
                            sum += by * by;
                          }).sum();
      tau[image] = sqrtf(moved) / length<Number>(fixed, width);
    }
  }
};

SCC_DEFINE_RUN(DriftJob)

std::tuple<Tensor, Tensor> drift_head(const Tensor& f,       // [L, B, D]
                                      const Tensor& anchor)  // [B, D]
{
  const Features features = read_features("drift_head", f);
  check(anchor.is_cpu() && anchor.scalar_type() == f.scalar_type(), "drift_head",
        "anchor must be a CPU tensor in the dtype of features");
  check(anchor.dim() == 2 && anchor.size(0) == features.batch && anchor.size(1) == features.width,
        "drift_head", "anchor must be (B, D)");
  const Tensor fixed = torch::stable::contiguous(anchor);
  Tensor tau = torch::stable::new_empty(f, {features.batch}, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(f, {features.views, features.batch, features.width});
  const DriftJob job{features, fixed.const_data_ptr(), floats(tau), gradient.mutable_data_ptr()};
  run(job, features.type(), features.rows(), features.grain());
  return {tau, gradient};
}

// ---- Cosines ------------------------------------------------------------------------------------

// The unit rows of some images, view by view, and how long the rows were.
struct UnitJob {
  const Features& features;
  int64_t first, images;
  float* unit;     // [L * images, D]
  float* lengths;  // [L * images]

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const auto* SCC_RESTRICT from = features.row<Number>(i / images, first + i % images);
      float* SCC_RESTRICT to = unit + i * features.width;
      // Widened first: of a row of halves g++ does not make the sum below a loop over vectors.
      for (int64_t k = 0; k < features.width; ++k) to[k] = Number::load(from[k]);
      const float size = std::max(length<Float32>(to, features.width), kTiny);
      for (int64_t k = 0; k < features.width; ++k) to[k] = to[k] / size;
      lengths[i] = size;
    }
  }
};

SCC_DEFINE_RUN(UnitJob)

// A chunk of images: unit rows and their cosines with every text.
struct Cosines {
  int64_t first, images;
  Tensor unit;                 // [L * images, D]
  std::vector<float> lengths;  // [L * images]
  Tensor values;               // [L * images, U]
};

Cosines cosines(const Features& features, const Tensor& text, int64_t first, int64_t images) {
  const int64_t rows = features.views * images;
  Tensor unit = torch::stable::new_empty(text, {rows, features.width});
  std::vector<float> lengths(rows);
  run(UnitJob{features, first, images, floats(unit), lengths.data()}, features.type(), rows,
      features.grain());
  Tensor values = product_transposed(unit, text);
  return {first, images, std::move(unit), std::move(lengths), std::move(values)};
}

// ---- Absent rows --------------------------------------------------------------------------------

// Present rows of the table: those with a count above 0.
struct Counts {
  std::vector<float> times;     // [U], or empty where each is counted once
  std::vector<int64_t> absent;  // rows counted 0 times
  int64_t first = 0;            // row that is not absent

  // A cosine below every other, in place of what an absent row's text gives.
  SCC_INLINE void hide(float* SCC_RESTRICT row) const {
    for (int64_t k : absent) row[k] = kNoCosine;
  }
};

Counts read_count(const char* op, const std::optional<Tensor>& count, int64_t classes) {
  Counts found;
  if (!count) return found;
  check(count->is_cpu() && count->scalar_type() == ScalarType::Long && count->dim() == 1 &&
            count->size(0) == classes,
        op, "count must be a (U,) int64 CPU tensor");
  const Tensor whole = torch::stable::contiguous(*count);
  const auto* from = static_cast<const int64_t*>(whole.const_data_ptr());
  for (int64_t k = 0; k < classes; ++k) {
    check(from[k] >= 0, op, "count must hold numbers >= 0");
    if (from[k] == 0) found.absent.push_back(k);
  }
  // Without any class the result is arbitrary: that of a full table.
  if (static_cast<int64_t>(found.absent.size()) == classes) return {};
  found.times.assign(from, from + classes);
  while (from[found.first] == 0) ++found.first;
  return found;
}

// ---- Margin -------------------------------------------------------------------------------------

struct MarginJob {
  const Features& features;
  const Cosines& chunk;
  const float *unit, *text, *soft;  // [L * images, D], [U, D], [B, D]
  float* values;                    // [L * images, U]
  const int64_t* label;             // [B]
  int64_t classes;
  const Counts& counts;
  float factor;    // s / L
  float* along;    // [L * images]
  void* gradient;  // [L, B, D]

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const int64_t width = features.width;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t view = i / chunk.images, image = chunk.first + i % chunk.images;
      float* SCC_RESTRICT cosine = values + i * classes;
      counts.hide(cosine);
      cosine[label[image]] = kNoCosine;
      const float most = largest(cosine, classes);
      // With no class but the label the maximum counts as 0.
      const float rival = most == kNoCosine ? 0.0f : 1.0f;
      const float* SCC_RESTRICT hardest = text + first_equal(cosine, classes, most) * width;
      const float* SCC_RESTRICT u = unit + i * width;
      const float* SCC_RESTRICT target = soft + image * width;
      const float dot = in_lanes(width, 0.0f, [&](float& sum, int64_t k) {
                          sum += u[k] * (target[k] - rival * hardest[k]);
                        }).sum();
      const float scale = factor / chunk.lengths[i];
      auto* SCC_RESTRICT to =
          static_cast<typename Number::Stored*>(gradient) + (view * features.batch + image) * width;
      for (int64_t k = 0; k < width; ++k) {
        to[k] = Number::store(scale * (target[k] - rival * hardest[k] - dot * u[k]));
      }
      along[i] = dot;
    }
  }
};

SCC_DEFINE_RUN(MarginJob)

std::tuple<Tensor, Tensor> margin_head(const Tensor& f,                     // [L, B, D]
                                       const Tensor& soft,                  // [B, D]
                                       const Tensor& label,                 // [B]
                                       const Tensor& text,                  // [U, D]
                                       const std::optional<Tensor>& count,  // [U]
                                       double scale) {
  const char* op = "margin_head";
  const Features features = read_features(op, f);
  const Tensor table = read_text(op, text, features);
  check(soft.is_cpu() && soft.scalar_type() == ScalarType::Float, op,
        "soft must be a float32 CPU tensor");
  check(soft.dim() == 2 && soft.size(0) == features.batch && soft.size(1) == features.width, op,
        "soft must be (B, D)");
  check(label.is_cpu() && label.scalar_type() == ScalarType::Long, op,
        "label must be an int64 CPU tensor");
  check(label.dim() == 1 && label.size(0) == features.batch, op, "label must be (B,)");
  const Tensor targets = torch::stable::contiguous(soft);
  const Tensor labels = torch::stable::contiguous(label);
  const auto* chosen = static_cast<const int64_t*>(labels.const_data_ptr());
  const int64_t classes = table.size(0);
  const Counts counts = read_count(op, count, classes);
  for (int64_t b = 0; b < features.batch; ++b) {
    check(chosen[b] >= 0 && chosen[b] < classes, op, "label must be rows of text");
  }
  Tensor value = torch::stable::new_empty(f, {features.batch}, ScalarType::Float);
  Tensor gradient = torch::stable::new_empty(f, {features.views, features.batch, features.width});
  const float factor = static_cast<float>(scale) / static_cast<float>(features.views);
  const int64_t step = features.chunk(classes);
  for (int64_t first = 0; first < features.batch; first += step) {
    const int64_t images = std::min(step, features.batch - first);
    Cosines chunk = cosines(features, table, first, images);
    std::vector<float> along(features.views * images);
    const MarginJob job{features,      chunk,           floats(std::as_const(chunk.unit)),
                        floats(table), floats(targets), floats(chunk.values),
                        chosen,        classes,         counts,
                        factor,        along.data(),    gradient.mutable_data_ptr()};
    run(job, features.type(), features.views * images, features.grain());
    for (int64_t b = 0; b < images; ++b) {
      float sum = 0.0f;
      for (int64_t view = 0; view < features.views; ++view) sum += along[view * images + b];
      floats(value)[first + b] = factor * sum;
    }
  }
  return {value, gradient};
}

// ---- Pseudo-label -------------------------------------------------------------------------------

// row = exp(scale * row - most), most being the largest exponent.
SCC_INLINE void exponentials(float* SCC_RESTRICT row, int64_t count, float scale, float most) {
  for (int64_t k = 0; k < count; ++k) row[k] = exp_nonpositive(scale * row[k] - most);
}

struct LabelJob {
  const Cosines& chunk;
  int64_t views, classes;
  float scale, power;  // s, 1/T
  float* values;       // [L * images, U]
  const Counts& counts;
  float* q;        // [B, U]
  int64_t* label;  // [B]

  template <class>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float* SCC_RESTRICT mean = q + (chunk.first + i) * classes;
      std::fill(mean, mean + classes, 0.0f);
      for (int64_t view = 0; view < views; ++view) {
        float* SCC_RESTRICT row = values + (view * chunk.images + i) * classes;
        counts.hide(row);
        const float most = scale * largest(row, classes);
        exponentials(row, classes, scale, most);
        const float share = 1.0f / (static_cast<float>(views) * total(row));
        for (int64_t k = 0; k < classes; ++k) mean[k] += share * row[k];
      }
      // Against the largest, so that the power neither overflows nor loses it.
      const float most = largest(mean, classes);
      label[chunk.first + i] = first_class(first_equal(mean, classes, most));
      for (int64_t k = 0; k < classes; ++k) {
        const float part = std::max(mean[k] / most, 0x1p-126f);
        mean[k] = power == 1.0f ? part : exp_nonpositive(power * log_positive(part));
      }
      const float sum = total(mean);
      for (int64_t k = 0; k < classes; ++k) mean[k] /= sum;
      for (int64_t k : counts.absent) mean[k] = 0.0f;
    }
  }

  // An absent row is below all classes or, at a scale of 0 and in rows of NaN, equal to all.
  SCC_INLINE int64_t first_class(int64_t found) const {
    return counts.times.empty() || counts.times[found] > 0.0f ? found : counts.first;
  }

  SCC_INLINE float total(const float* SCC_RESTRICT row) const {
    const float* SCC_RESTRICT count = counts.times.data();
    if (counts.times.empty()) {
      return in_lanes(classes, 0.0f, [&](float& sum, int64_t k) { sum += row[k]; }).sum();
    }
    return in_lanes(classes, 0.0f, [&](float& sum, int64_t k) { sum += count[k] * row[k]; }).sum();
  }
};

SCC_DEFINE_RUN(LabelJob)

struct NormaliseJob {
  float* data;  // [B, D]
  int64_t width;

  template <class>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float* SCC_RESTRICT row = data + i * width;
      const float divisor = std::max(length<Float32>(row, width), kTiny);
      for (int64_t k = 0; k < width; ++k) row[k] /= divisor;
    }
  }
};

SCC_DEFINE_RUN(NormaliseJob)

std::tuple<Tensor, Tensor, Tensor> pseudo_label(const Tensor& f,                     // [L, B, D]
                                                const Tensor& text,                  // [U, D]
                                                const std::optional<Tensor>& count,  // [U]
                                                double scale, double, double temperature) {
  const char* op = "pseudo_label";
  const Features features = read_features(op, f);
  const Tensor table = read_text(op, text, features);
  check(temperature > 0.0, op, "temperature must be above 0");
  check_not_negative(op, "scale must be a finite number >= 0", {scale});
  const int64_t classes = table.size(0);
  const Counts counts = read_count(op, count, classes);
  Tensor q = torch::stable::new_empty(table, {features.batch, classes});
  Tensor label = torch::stable::new_empty(table, {features.batch}, ScalarType::Long);
  const int64_t step = features.chunk(classes);
  for (int64_t first = 0; first < features.batch; first += step) {
    const int64_t images = std::min(step, features.batch - first);
    Cosines chunk = cosines(features, table, first, images);
    // The bias cancels in a softmax.
    const LabelJob job{chunk,
                       features.views,
                       classes,
                       static_cast<float>(scale),
                       static_cast<float>(1.0 / temperature),
                       floats(chunk.values),
                       counts,
                       floats(q),
                       static_cast<int64_t*>(label.mutable_data_ptr())};
    run(job, ScalarType::Float, images, 1);
  }
  Tensor weights = q;
  if (!counts.times.empty()) {
    weights = torch::stable::clone(q);
    float* to = floats(weights);
    for (int64_t i = 0; i < q.numel(); ++i) to[i] *= counts.times[i % classes];
  }
  Tensor soft = features.batch ? product_transposed(weights, torch::stable::transpose(table, 0, 1))
                               : torch::stable::new_empty(table, {0, features.width});
  run(NormaliseJob{floats(soft), features.width}, ScalarType::Float, features.batch,
      features.grain());
  return {q, label, soft};
}

// ---- Mean logits --------------------------------------------------------------------------------

// z, the mean of the unit rows over the views or their weighted sum, times s: the logits are linear
// in it, so one product serves all views.
struct MeanJob {
  const Features& features;
  const float* weights;  // [L, B], or null: 1 / L
  float scale;
  bool unit;    // z is scaled to unit length; of zeros the first view's row is taken
  float* mean;  // [B, D]

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const int64_t width = features.width;
    for (int64_t i = begin; i < end; ++i) {
      float* SCC_RESTRICT to = mean + i * width;
      std::fill(to, to + width, 0.0f);
      for (int64_t view = 0; view < features.views; ++view) {
        const auto* SCC_RESTRICT from = features.row<Number>(view, i);
        const float divisor = std::max(length<Number>(from, width), kTiny);
        const float weight = weights ? weights[view * features.batch + i] : 1.0f;
        for (int64_t k = 0; k < width; ++k) to[k] += weight * (Number::load(from[k]) / divisor);
      }
      float factor = weights ? scale : scale / static_cast<float>(features.views);
      if (unit) {
        float size = length<Float32>(to, width);
        if (size == 0.0f) {
          const auto* SCC_RESTRICT own = features.row<Number>(0, i);
          for (int64_t k = 0; k < width; ++k) to[k] = Number::load(own[k]);
          size = length<Float32>(to, width);
        }
        factor = scale / std::max(size, kTiny);
      }
      for (int64_t k = 0; k < width; ++k) to[k] *= factor;
    }
  }
};

SCC_DEFINE_RUN(MeanJob)

Tensor mean_logits(const Tensor& f,                       // [L, B, D]
                   const Tensor& text,                    // [U, D]
                   const std::optional<Tensor>& weights,  // [L, B]
                   double scale, double bias, bool unit) {
  const Features features = read_features("mean_logits", f);
  const Tensor table = read_text("mean_logits", text, features);
  check(!weights || (weights->is_cpu() && weights->scalar_type() == ScalarType::Float &&
                     weights->dim() == 2 && weights->size(0) == features.views &&
                     weights->size(1) == features.batch),
        "mean_logits", "weights must be a (L, B) float32 CPU tensor");
  const Tensor held = weights ? torch::stable::contiguous(*weights) : table;
  if (!features.batch) return torch::stable::new_empty(table, {0, table.size(0)});
  Tensor mean = torch::stable::new_empty(table, {features.batch, features.width});
  const float* shares = weights ? floats(held) : nullptr;
  run(MeanJob{features, shares, static_cast<float>(scale), unit, floats(mean)}, features.type(),
      features.batch, features.grain());
  Tensor logits = product_transposed(mean, table);
  if (bias != 0.0) {
    float* to = floats(logits);
    for (int64_t i = 0; i < logits.numel(); ++i) to[i] += static_cast<float>(bias);
  }
  return logits;
}

// ---- Weights of the views -----------------------------------------------------------------------

SCC_INLINE float product_of(const float* SCC_RESTRICT a, const float* SCC_RESTRICT b,
                            int64_t width) {
  return in_lanes(width, 0.0f, [&](float& sum, int64_t k) { sum += a[k] * b[k]; }).sum();
}

struct WeightsJob {
  const Features& features;
  const Extrapolation& rule;
  float *weights, *cosine, *agreement;  // [L, B], [B], [B]

  template <class Number>
  SCC_INLINE void rows(int64_t begin, int64_t end) const {
    const int64_t width = features.width, views = features.views;
    const float count = static_cast<float>(views - 1);
    std::vector<float> units(views * width), middle(width), direction(width);
    float* SCC_RESTRICT own = units.data();
    float* SCC_RESTRICT mean = middle.data();
    float* SCC_RESTRICT along = direction.data();
    for (int64_t i = begin; i < end; ++i) {
      std::fill(mean, mean + width, 0.0f);
      for (int64_t view = 0; view < views; ++view) {
        const auto* SCC_RESTRICT from = features.row<Number>(view, i);
        float* SCC_RESTRICT u = own + view * width;
        for (int64_t k = 0; k < width; ++k) u[k] = Number::load(from[k]);
        const float divisor = std::max(length<Float32>(u, width), kTiny);
        for (int64_t k = 0; k < width; ++k) u[k] /= divisor;
        if (view == 0) continue;
        for (int64_t k = 0; k < width; ++k) mean[k] += u[k] / count;
      }
      for (int64_t k = 0; k < width; ++k) along[k] = mean[k] - own[k];
      const float a = product_of(own, mean, width), far = length<Float32>(along, width);
      const float size = std::max(length<Float32>(mean, width), kTiny), p = a / size;
      const float side = sqrtf(in_lanes(width, 0.0f, [&](float& sum, int64_t k) {
                                 const float off = mean[k] / size - p * own[k];
                                 sum += off * off;
                               }).sum());
      float agreed = 0.0f;
      for (int64_t view = 1; view < views; ++view) {
        float* SCC_RESTRICT drift = own + view * width;
        for (int64_t k = 0; k < width; ++k) drift[k] -= own[k];
        const float moved = length<Float32>(drift, width);
        const float scale = std::max(moved * far, kStill * kStill);
        if (!(moved <= kStill)) agreed += product_of(drift, along, width) / scale;
      }
      cosine[i] = a;
      agreement[i] = within_one(agreed / count);
      const Shares found = shares(rule, a, agreement[i], size, side, count);
      weights[i] = found.first;
      for (int64_t view = 1; view < views; ++view) {
        weights[view * features.batch + i] = found.rest / count;
      }
    }
  }
};

SCC_DEFINE_RUN(WeightsJob)

std::tuple<Tensor, Tensor, Tensor> view_weights(const Tensor& f,  // [L, B, D]
                                                double low, double high, double threshold,
                                                double slope, bool geodesic) {
  const Features features = read_features("view_weights", f);
  check(features.views >= 2, "view_weights", "features must be of at least 2 views");
  Tensor weights = torch::stable::new_empty(f, {features.views, features.batch}, ScalarType::Float);
  Tensor cosine = torch::stable::new_empty(f, {features.batch}, ScalarType::Float);
  Tensor agreement = torch::stable::new_empty(f, {features.batch}, ScalarType::Float);
  const Extrapolation rule = extrapolation(low, high, threshold, slope, geodesic);
  run(WeightsJob{features, rule, floats(weights), floats(cosine), floats(agreement)},
      features.type(), features.batch, features.grain());
  return {weights, cosine, agreement};
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("drift_head", TORCH_BOX(&scc_fast::drift_head));
  m.impl("pseudo_label", TORCH_BOX(&scc_fast::pseudo_label));
  m.impl("margin_head", TORCH_BOX(&scc_fast::margin_head));
  m.impl("mean_logits", TORCH_BOX(&scc_fast::mean_logits));
  m.impl("view_weights", TORCH_BOX(&scc_fast::view_weights));
}
