// The mathematics of one element, the same text on host and device. No torch header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SCC_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)  // inline in every clone (cpu/simd.h), however long
#define SCC_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SCC_HOST_DEVICE inline
#endif

namespace scc_fast {

// ---- exp and log without branches, so that a loop over them vectorises --------------------------

SCC_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SCC_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SCC_HOST_DEVICE float clamp(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

// Natural logarithm of a normal positive number, within 1 ulp: with x = 2^k m, m in [√½, √2), and
// s = (m - 1) / (m + 1), log m is a series in s.
SCC_HOST_DEVICE float log_positive(float value) {
  const uint32_t shifted = bits_of(value) + (0x3F800000 - 0x3F3504F3);
  const float k = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float f = float_of((shifted & 0x7FFFFF) + 0x3F3504F3) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float series =
      z * (0x1.555554p-1f + z * (0x1.999c26p-2f + z * (0x1.23d3dcp-2f + z * 0x1.f13c4cp-3f)));
  const float half_square = 0.5f * f * f;
  // ln 2 in two parts: k times the first is exact.
  return s * (half_square + series) + k * 0x1.2fefa2p-17f - half_square + f + k * 0x1.62e3p-1f;
}

// e^x for x <= 0, within 1 ulp; below -87 it stays at about 1e-38.
SCC_HOST_DEVICE float exp_nonpositive(float value) {
  const float x = clamp(value, -87.0f, 0.0f);
  const float rounder = 12582912.0f;  // added and taken off again, it rounds to a whole number
  const float shifted = x * 0x1.715476p+0f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;
  const float p =
      0x1.0p-1f + r * (0x1.555554p-3f +
                       r * (0x1.555382p-5f +
                            r * (0x1.11121p-7f + r * (0x1.6e879cp-10f + r * 0x1.a0d2cep-13f))));
  const float small = 1.0f + (r + r * r * p);
  return small * float_of((bits_of(shifted) << 23) + 0x3F800000);  // NaN stays, as it is no int
}

// 2^x for x <= 0, within 2 ulp; 0 below -126, and NaN stays. What it is given there is not clamped:
// whatever comes of it is not taken.
SCC_HOST_DEVICE float exp2_nonpositive(float x) {
  const float shifted = x + 12582912.0f;  // rounds to a whole number, in the last bits
  const float f = x - (shifted - 12582912.0f);
  const float low = 0x1.62e432p-1f + f * (0x1.ebfbe2p-3f + f * 0x1.c6ae72p-5f);
  const float high = 0x1.3b270ep-7f + f * (0x1.5f7276p-10f + f * 0x1.470b4ap-13f);
  const float power = 1.0f + f * (low + f * f * f * high);
  const float whole = float_of((bits_of(shifted) << 23) + 0x3F800000);
  return x < -126.0f ? 0.0f : power * whole;
}

// ---- Activations --------------------------------------------------------------------------------
// Each is x times a share in [0, 1]; its slope is share + x share'. An infinity gives what torch
// gives for float64: value inf at inf, else NaN. The polynomials here and in exp2_nonpositive are
// fits of our own (Remez, least relative error).

// 1 / (1 + 2^-z), which is sigmoid(z ln 2), and the sigmoid's derivative there: not a difference,
// so that nothing is lost where the share is near 1.
SCC_HOST_DEVICE float sigmoid2(float z, float* derivative) {
  const float e = exp2_nonpositive(-fabsf(z));
  const float r = 1.0f / (1.0f + e);
  const float other = e * r;
  *derivative = other * r;
  return z < 0.0f ? other : r;
}

// The normal distribution's P(X <= x), and its density. With a = |x| and t = 1 / (1 + p a),
// P(X <= -a) = exp(-a a / 2) t q(t): what multiplies the exponential is smooth and has no zero, so
// that the tail keeps its relative accuracy, unlike 1 + erf. q is off by 5e-8 for a <= 9.5.
SCC_HOST_DEVICE float normal_below(float x, float* density) {
  const float a = fabsf(x);
  const float e = exp2_nonpositive(-0x1.715476p-1f * (a * a));
  const float t = 1.0f / (1.0f + 0x1.30a3d8p-2f * a);
  const float low =
      0x1.e5b376p-4f + t * (0x1.edb7bap-4f + t * (0x1.82afdap-4f + t * 0x1.26e7eap-3f));
  const float high =
      -0x1.51dc8p-4f + t * (0x1.e7956cp-3f + t * (-0x1.5e2904p-3f + t * 0x1.3631a8p-5f));
  const float square = t * t;
  const float tail = e * t * (low + square * square * high);
  *density = e * 0x1.988454p-2f;
  return x < 0.0f ? tail : 1.0f - tail;
}

struct QuickGelu {  // x sigmoid(1.702 x)
  static SCC_HOST_DEVICE float value(float x) {
    float derivative;
    return x * sigmoid2(x * 0x1.3a4cbep+1f, &derivative);
  }
  static SCC_HOST_DEVICE float slope(float x) {
    float derivative;
    const float share = sigmoid2(x * 0x1.3a4cbep+1f, &derivative);
    return share + 1.702f * (x * derivative);
  }
};

struct ErfGelu {  // x P(X <= x)
  static SCC_HOST_DEVICE float value(float x) {
    float density;
    return x * normal_below(x, &density);
  }
  static SCC_HOST_DEVICE float slope(float x) {
    float density;
    const float share = normal_below(x, &density);
    return share + x * density;
  }
};

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 u): no tanh,
// and nothing is lost near zero. The square is held where the sigmoid has long been 0 or 1.
struct TanhGelu {
  static SCC_HOST_DEVICE float square(float x) {
    const float whole = x * x;
    return whole > 1e4f ? 1e4f : whole;
  }
  static SCC_HOST_DEVICE float share(float x, float squared, float* derivative) {
    return sigmoid2(x * (0x1.26aec2p+1f + 0x1.a5a7dp-4f * squared), derivative);
  }
  static SCC_HOST_DEVICE float value(float x) {
    float derivative;
    return x * share(x, square(x), &derivative);
  }
  static SCC_HOST_DEVICE float slope(float x) {
    float derivative;
    const float squared = square(x);
    const float part = share(x, squared, &derivative);
    return part + x * derivative * (0x1.988454p+0f + 0x1.b6676cp-3f * squared);
  }
};

// ---- Random numbers (METHOD.md) -----------------------------------------------------------------
// key = the two halves of an image's seed, low first; counter = (block low, block high, view,
// purpose). Element e of an image is lane e % 4 of block e / 4.

constexpr uint32_t kViewNoise = 2;  // VIEW_NOISE of scc_fast/reference/philox.py

struct Words {
  uint32_t w[4];
};

struct Floats {
  float f[4];
};

SCC_HOST_DEVICE Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.w[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.w[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.w[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.w[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The four words of one block of an image's stream.
SCC_HOST_DEVICE Words random_words(int64_t seed, int64_t block, uint32_t view, uint32_t purpose) {
  const auto key = static_cast<uint64_t>(seed);
  const auto index = static_cast<uint64_t>(block);
  return philox4x32_10(
      {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), view, purpose}},
      static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// In [0, 1), a multiple of 2^-24, hence exact.
SCC_HOST_DEVICE float uniform01(uint32_t word) {
  return static_cast<int32_t>(word >> 8) * 0x1p-24f;  // signed: what AVX2 can convert
}

SCC_HOST_DEVICE Floats uniform4(Words words) {
  return {
      {uniform01(words.w[0]), uniform01(words.w[1]), uniform01(words.w[2]), uniform01(words.w[3])}};
}

// Two standard normals, (radius cos, radius sin), within 4 ulp.
//
// The angle is reduced on the integer, exactly: quadrant + t quarter turns, t in [-1/2, 1/2], so
// nothing is lost near the zeros. The polynomials for sin and cos of t quarter turns are off by
// less than 0.3 ulp; unlike sinf and cosf they are the same on every backend, with no slow path.
SCC_HOST_DEVICE void box_muller(uint32_t radius_word, uint32_t angle_word, float* cosine,
                                float* sine) {
  const float radius =
      sqrtf(-2.0f * log_positive(static_cast<int32_t>((radius_word >> 8) + 1) * 0x1p-24f));
  const uint32_t angle = angle_word >> 8;  // of a turn of 2^24
  const uint32_t quadrant = (angle + (1u << 21)) >> 22;
  const float t = static_cast<int32_t>(angle - (quadrant << 22)) * 0x1p-22f;
  const float z = t * t;
  // pi/2 comes in two parts, the second (-0x1.777a5cp-25) within the small sum.
  const float s = t * 0x1.921fb6p+0f +
                  t * (-0x1.777a5cp-25f +
                       z * (-0x1.4abbcep-1f +
                            z * (0x1.466bbcp-4f + z * (-0x1.32cb0ep-8f + z * 0x1.4be09ep-13f))));
  const float c = 1.0f + z * (-0x1.3bd3ccp+0f +
                              z * (0x1.03c1dep-2f + z * (-0x1.55c5e0p-6f + z * 0x1.d9d57cp-11f)));
  const bool odd = quadrant & 1;
  *cosine = radius * ((quadrant + 1) & 2 ? -1.0f : 1.0f) * (odd ? s : c);
  *sine = radius * (quadrant & 2 ? -1.0f : 1.0f) * (odd ? c : s);
}

SCC_HOST_DEVICE Floats normal4(Words words) {
  Floats out;
  box_muller(words.w[0], words.w[1], &out.f[0], &out.f[1]);
  box_muller(words.w[2], words.w[3], &out.f[2], &out.f[3]);
  return out;
}

// ---- Views and step (METHOD.md) -----------------------------------------------------------------
// A view shifts by (down, right), then flips left to right, then adds noise and clamps to [0, 1].
// The host and device compilers are told not to contract a * b + c: every backend and every
// instruction set then rounds as the reference does.

struct View {
  int64_t down, right;
  bool flip;
  float noise;  // standard deviation
};

// The column of the picture that a view's column shows; outside [0, width) it shows the fill.
SCC_HOST_DEVICE int64_t source_column(const View& view, int64_t column, int64_t width) {
  return (view.flip ? width - 1 - column : column) - view.right;
}

// The column of a view that shows the picture's column; outside [0, width) none does.
SCC_HOST_DEVICE int64_t view_column(const View& view, int64_t column, int64_t width) {
  const int64_t shifted = column + view.right;
  return view.flip ? width - 1 - shifted : shifted;
}

SCC_HOST_DEVICE float normalise(float pixel, float mean, float std) { return (pixel - mean) / std; }

SCC_HOST_DEVICE float add_noise(float pixel, float sigma, float normal) {
  return pixel + sigma * normal;
}

// Whether clamping to [0, 1] passes a gradient on; a limit itself does.
SCC_HOST_DEVICE bool in_box(float pixel) { return pixel >= 0.0f && pixel <= 1.0f; }

// The ascent step and its projection to the ball and the box; sign(0) = 0.
SCC_HOST_DEVICE float projected_step(float delta, float gradient, float pixel, float alpha,
                                     float epsilon) {
  const float sign = static_cast<float>((gradient > 0.0f) - (gradient < 0.0f));
  const float inside = clamp(delta + alpha * sign, -epsilon, epsilon);
  return clamp(pixel + inside, 0.0f, 1.0f) - pixel;
}

// ---- Warps --------------------------------------------------------------------------------------
// A place in a view, times a 3 x 3 matrix, is one in the picture; there lie N x N pixels around it,
// two or four along each axis.

// Held to what can still be seen from there, three pixels outside; no number is out there as well.
SCC_HOST_DEVICE float held(float position, float first, float last) {
  const float low = first - 3.0f, high = last + 3.0f;
  const float raised = position > low ? position : low;
  return raised < high ? raised : high;
}

// The largest whole number not above a position that is held; vectorises on every x86.
SCC_HOST_DEVICE int whole_below(float position) {
  const int cut = static_cast<int>(position);
  return cut - (static_cast<float>(cut) > position);
}

// The cubic with a = -1, which Pillow turns pictures with, less and more than one pixel away.
SCC_HOST_DEVICE float cubic_near(float t) { return (t - 2.0f) * t * t + 1.0f; }
SCC_HOST_DEVICE float cubic_far(float t) { return ((5.0f - t) * t - 8.0f) * t + 4.0f; }

// The weight of the k-th of N pixels at a distance t in [0, 1) past the one below.
template <int N>
SCC_HOST_DEVICE float tap_weight(int k, float t) {
  if (N == 2) return k == 0 ? 1.0f - t : t;
  return k == 0   ? cubic_far(t + 1.0f)
         : k == 1 ? cubic_near(t)
         : k == 2 ? cubic_near(1.0f - t)
                  : cubic_far(2.0f - t);
}

constexpr int kMostSamples = 8;  // MOST_SAMPLES of scc_fast/reference/warp.py

// What a view may see of its picture: columns and rows, the last ones included.
struct Limits {
  int left, top, right, bottom;
};

SCC_HOST_DEVICE int clamp_whole(int64_t value, int64_t low, int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

// `box` is top, left, height, width, and may be null; it is held to the picture.
SCC_HOST_DEVICE Limits limits_of(const int64_t* box, int height, int width) {
  if (box == nullptr) return {0, 0, width - 1, height - 1};
  const int top = clamp_whole(box[0], 0, height - 1), left = clamp_whole(box[1], 0, width - 1);
  return {left, top, clamp_whole(box[1] + box[3] - 1, left, width - 1),
          clamp_whole(box[0] + box[2] - 1, top, height - 1)};
}

SCC_HOST_DEVICE float accumulate(float sum, float weight, float value) {
  return sum + weight * value;
}

}  // namespace scc_fast
