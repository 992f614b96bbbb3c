// What the CPU kernels share: clones per instruction set, number formats, sums in lanes.
#pragma once

#include <cstdint>

#include "pixel_math.h"
#include "tensor.h"

// A function marked so is compiled for AVX-512, AVX2 and the baseline, and the loader takes the
// best that the processor has; one binary runs everywhere. What it calls must be SCC_INLINE, or it
// is compiled for the baseline alone. (A sanitizer cannot run before the loader's choice, hence
// SCC_FAST_NO_CLONES.)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(SCC_FAST_NO_CLONES)
#define SCC_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define SCC_HAS_CLONES
#else
#define SCC_CLONES
#endif

#if defined(__GNUC__)
#define SCC_INLINE inline __attribute__((always_inline))
#define SCC_RESTRICT __restrict__
#else
#define SCC_INLINE __forceinline
#define SCC_RESTRICT __restrict
#endif

namespace scc_fast {

// ---- Number formats: how a float is kept in memory; to nearest, ties to even --------------------

struct Float32 {
  using Stored = float;
  static SCC_INLINE float load(Stored value) { return value; }
  static SCC_INLINE Stored store(float value) { return value; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static SCC_INLINE float load(Stored value) { return float_of(uint32_t{value} << 16); }
  static SCC_INLINE Stored store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return static_cast<Stored>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
};

// By arithmetic on the bits and without branches: no x86 baseline has the conversion.
struct Float16 {
  using Stored = uint16_t;
  static SCC_INLINE float load(Stored value) {
    const uint32_t magnitude = (value & 0x7FFFu) << 13;
    const uint32_t exponent = magnitude & 0x0F800000;
    const uint32_t normal = magnitude + (112u << 23);
    const uint32_t special = normal + (112u << 23);  // infinity and NaN
    const float tiny = float_of(normal + (1u << 23)) - float_of(113u << 23);
    const uint32_t bits = exponent == 0 ? bits_of(tiny) : exponent == 0x0F800000 ? special : normal;
    return float_of(bits | (value & 0x8000u) << 16);
  }
  static SCC_INLINE Stored store(float value) {
    const uint32_t sign = bits_of(value) & 0x80000000;
    const uint32_t bits = bits_of(value) ^ sign;
    const uint32_t normal = (bits + 0xC8000FFF + ((bits >> 13) & 1)) >> 13;
    // Adding 1/2 leaves a subnormal half in the last bits, rounded by the addition.
    const uint32_t tiny = bits_of(float_of(bits) + 0.5f) - 0x3F000000;
    const uint32_t special = bits > 0x7F800000 ? 0x7E00 : 0x7C00;
    const uint32_t half = bits >= 0x477FF000 ? special : bits < 0x38800000 ? tiny : normal;
    return static_cast<Stored>(half | sign >> 16);
  }
};

// ---- Jobs: rows that do not depend on each other, for one number format -------------------------

// Defines run(job, type, count, grain), which calls job.rows<Number>(begin, end) in parallel.
#define SCC_DEFINE_RUN(Job)                                                                  \
  SCC_CLONES void float32_##Job(const Job& job, int64_t begin, int64_t end) {                \
    job.rows<Float32>(begin, end);                                                           \
  }                                                                                          \
  SCC_CLONES void float16_##Job(const Job& job, int64_t begin, int64_t end) {                \
    job.rows<Float16>(begin, end);                                                           \
  }                                                                                          \
  SCC_CLONES void bfloat16_##Job(const Job& job, int64_t begin, int64_t end) {               \
    job.rows<BFloat16>(begin, end);                                                          \
  }                                                                                          \
  void run(const Job& job, ScalarType type, int64_t count, int64_t grain) {                  \
    const auto rows = type == ScalarType::Float  ? float32_##Job                             \
                      : type == ScalarType::Half ? float16_##Job                             \
                                                 : bfloat16_##Job;                           \
    torch::stable::parallel_for(0, count, grain,                                             \
                                [&](int64_t begin, int64_t end) { rows(job, begin, end); }); \
  }

// ---- Sums and maxima over a row: kLanes partial results
// ------------------------------------------ They vectorise, with the same order of additions on
// every instruction set.

constexpr int kLanes = 16;

struct Lanes {
  float lane[kLanes];

  explicit SCC_INLINE Lanes(float value) {
    for (float& each : lane) each = value;
  }
  SCC_INLINE float sum() const {
    float total = 0.0f;
    for (float each : lane) total += each;
    return total;
  }
  SCC_INLINE float max() const {
    float most = lane[0];
    for (float each : lane) most = each > most ? each : most;
    return most;
  }
};

// Calls add(partial result, index) for every index below count, and returns the partial results.
template <class Add>
SCC_INLINE Lanes in_lanes(int64_t count, float start, const Add& add) {
  Lanes lanes(start);
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(lanes.lane[lane], first + lane);
  }
  for (; first < count; ++first) add(lanes.lane[first % kLanes], first);
  return lanes;
}

}  // namespace scc_fast
