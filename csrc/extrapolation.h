// The weights of view extrapolation from the sums over a picture's features, for both devices
// (METHOD.md, View extrapolation; reference/heads.py, view_weights).
#pragma once

#include <cmath>

#include "pixel_math.h"

namespace scc_fast {

constexpr float kStill = 1e-5f;  // drifts of unit features up to this length are rounding

struct Extrapolation {
  float low, high, threshold, slope;
  bool geodesic;
};

inline Extrapolation extrapolation(double low, double high, double threshold, double slope,
                                   bool geodesic) {
  return {static_cast<float>(low), static_cast<float>(high), static_cast<float>(threshold),
          static_cast<float>(slope), geodesic};
}

// Rounding brings a cosine beyond 1; NaN stays.
SCC_HOST_DEVICE float within_one(float r) { return r > 1.0f ? 1.0f : r < -1.0f ? -1.0f : r; }

// The weight of the picture's own unit feature u_1, and of m, the mean of the others.
struct Shares {
  float first, rest;
};

// a = <u_1, m>, r the agreement, size = |m|, side = the sine between u_1 and m; `count` others.
SCC_HOST_DEVICE Shares shares(const Extrapolation& rule, float a, float r, float size, float side,
                              float count) {
  if (!rule.geodesic) {
    float part = r > rule.threshold ? 1.0f : 0.0f;
    if (rule.slope < INFINITY) part = 1.0f / (1.0f + expf(-rule.slope * (r - rule.threshold)));
    const float c = rule.low + (rule.high - rule.low) * part;
    return {1.0f - c, c};
  }
  const float p = a / size, theta = atan2f(side, p);
  if (side < 1e-6f) return {1.0f, 0.0f};
  const float between = (count * size * size - 1.0f) / fmaxf(count - 1.0f, 1.0f);
  const float tight = fminf(fmaxf((between + 1.0f) / 2.0f, 0.0f), 1.0f);
  const float apart = fminf(fmaxf(1.0f - a, 1e-30f), 1.0f);
  const float score = fminf(powf(apart, 0.9f) * tight, 1.0f);
  const float beta = rule.low + (rule.high - rule.low) * score;
  float sine, cosine;
#ifdef __CUDA_ARCH__
  sincospif(beta * theta * 0.318309886f, &sine, &cosine);  // sinf would take memory for its range
#else
  sine = sinf(beta * theta), cosine = cosf(beta * theta);
#endif
  return {cosine - sine / side * p, sine / side / size};
}

}  // namespace scc_fast
