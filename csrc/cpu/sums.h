// Rows of numbers, and sums over a row in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace scc_fast {

template <class Number>
SCC_INLINE const typename Number::Stored* row_of(const void* data, int64_t row, int64_t width) {
  return static_cast<const typename Number::Stored*>(data) + row * width;
}

template <class Number>
SCC_INLINE typename Number::Stored* row_of(void* data, int64_t row, int64_t width) {
  return static_cast<typename Number::Stored*>(data) + row * width;
}

// kLanes partial sums at once. Written as a vector, as g++ 12 makes shuffles of a loop over two
// arrays of them; handed on by reference, as the baseline has no registers of this width.
#if defined(__GNUC__)
typedef float Sixteen __attribute__((vector_size(4 * kLanes)));
#else
struct Sixteen {
  float lane[kLanes];
  float& operator[](int i) { return lane[i]; }
  Sixteen& operator+=(const Sixteen& other) {
    for (int i = 0; i < kLanes; ++i) lane[i] += other.lane[i];
    return *this;
  }
  friend Sixteen operator-(Sixteen one, float other) {
    for (float& each : one.lane) each -= other;
    return one;
  }
  friend Sixteen operator*(Sixteen one, float other) {
    for (float& each : one.lane) each *= other;
    return one;
  }
  friend Sixteen operator*(Sixteen one, const Sixteen& other) {
    for (int i = 0; i < kLanes; ++i) one.lane[i] *= other.lane[i];
    return one;
  }
};
#endif

SCC_INLINE void load(const float* from, Sixteen& to) { memcpy(&to, from, sizeof to); }

SCC_INLINE float sum_of(const Sixteen& parts) {
  float lane[kLanes];
  memcpy(lane, &parts, sizeof lane);
  for (int half = kLanes / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

SCC_INLINE float sum_of(const float* row, int64_t width) {
  Sixteen one{}, two{}, parts;
  int64_t k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    load(row + k, parts);
    one += parts;
    load(row + k + kLanes, parts);
    two += parts;
  }
  one += two;
  for (; k < width; ++k) one[k % kLanes] += row[k];
  return sum_of(one);
}

struct Sums {
  float plain, product;
};

// The sums of a and of a (row - shift), where a is the factor, or row - shift itself.
template <bool kSquare>
SCC_INLINE Sums sums_of(const float* factor, const float* row, float shift, int64_t width) {
  Sixteen plain{}, product{}, a, off;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    load(row + k, off);
    off = off - shift;
    if (kSquare) {
      a = off;
    } else {
      load(factor + k, a);
    }
    plain += a;
    product += a * off;
  }
  for (int i = 0; k < width; ++i, ++k) {
    const float by = row[k] - shift;
    const float with = kSquare ? by : factor[k];
    plain[i] += with;
    product[i] += with * by;
  }
  return {sum_of(plain), sum_of(product)};
}

}  // namespace scc_fast
