// The mathematics of one element, the same text on host and device. No torch header.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SCC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SCC_HOST_DEVICE inline
#endif

namespace scc_fast {

// ---- Random numbers (METHOD.md) -----------------------------------------------------------------
// key = the two halves of an image's seed, low first; counter = (block low, block high, view,
// purpose). Element e of an image is lane e % 4 of block e / 4.

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
SCC_HOST_DEVICE float uniform01(uint32_t word) { return (word >> 8) * 0x1p-24f; }

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
  const float radius = sqrtf(-2.0f * logf(((radius_word >> 8) + 1) * 0x1p-24f));
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

}  // namespace scc_fast
