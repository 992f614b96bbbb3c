// Products of small float32 matrices that lie in the cache, and what brings their rows there. For
// one source file each: all is in its unnamed namespace, and compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/sums.h"

// From here to the end of the file that includes this, a * b + c may be fused, which products need
// to be twice as fast. Elsewhere it may not: what works on pixels agrees between backends to the
// bit.
#if defined(__clang__)
#pragma clang fp contract(fast)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif

namespace scc_fast {
namespace {

// ---- Products -----------------------------------------------------------------------------------

constexpr int kTall = 5, kWide = 5;  // rows and vectors of the largest tile of a product

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// c = a b, or c += a b: a by element with two strides, rows of b and c as whole vectors.
struct Product {
  int64_t rows, depth, vectors;
  const float* a;
  int64_t a_row, a_depth;
  const float* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  bool add;
};

template <int kRows, int kVectors>
SCC_INLINE void tile(const Product& p, int64_t row, int64_t column) {
  Sixteen sum[kRows][kVectors], across[kVectors];
  float* c = p.c + row * p.c_row + column;
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = Sixteen{};
      if (p.add) load(c + i * p.c_row + j * kLanes, sum[i][j]);
    }
  }
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  const int64_t a_row = p.a_row, a_depth = p.a_depth, b_depth = p.b_depth;
  for (int64_t k = p.depth; k > 0; --k, a += a_depth, b += b_depth) {
    for (int j = 0; j < kVectors; ++j) load(b + j * kLanes, across[j]);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVectors; ++j) sum[i][j] += across[j] * a[i * a_row];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      memcpy(c + i * p.c_row + j * kLanes, &sum[i][j], sizeof(Sixteen));
    }
  }
}

template <int kVectors>
SCC_INLINE void panel(const Product& p, int64_t column) {
  int64_t row = 0;
  for (; row + kTall <= p.rows; row += kTall) tile<kTall, kVectors>(p, row, column);
  const int64_t left = p.rows - row;
  if (left == 4) tile<4, kVectors>(p, row, column);
  if (left == 3) tile<3, kVectors>(p, row, column);
  if (left == 2) tile<2, kVectors>(p, row, column);
  if (left == 1) tile<1, kVectors>(p, row, column);
}

template <int kMost>
SCC_INLINE void panels(const Product& p) {
  const int64_t count = (p.vectors + kMost - 1) / kMost;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = p.vectors * i / count, vectors = p.vectors * (i + 1) / count - first;
    const int64_t column = first * kLanes;
    if constexpr (kMost >= 5) {
      if (vectors == 5) panel<5>(p, column);
      if (vectors == 4) panel<4>(p, column);
      if (vectors == 3) panel<3>(p, column);
      if (vectors == 2) panel<2>(p, column);
    }
    if (vectors == 1) panel<1>(p, column);
  }
}

// 25 sums fit into the registers of AVX-512 alone, hence versions of its own instead of clones.
#ifdef SCC_HAS_CLONES
__attribute__((target("arch=x86-64-v4"))) void product(const Product& p) { panels<kWide>(p); }
__attribute__((target("arch=x86-64-v3"))) void product(const Product& p) { panels<1>(p); }
__attribute__((target("default"))) void product(const Product& p) { panels<1>(p); }
#elif defined(__AVX512F__)
void product(const Product& p) { panels<kWide>(p); }
#else
void product(const Product& p) { panels<1>(p); }
#endif

// ---- Rows in and out ----------------------------------------------------------------------------

template <class Number>
SCC_INLINE void widen(const void* data, int64_t stride, int64_t rows, int64_t width, float by,
                      float* to, int64_t across) {
  for (int64_t i = 0; i < rows; ++i, to += across) {
    const auto* SCC_RESTRICT from = row_of<Number>(data, i, stride);
    float* SCC_RESTRICT row = to;
    for (int64_t k = 0; k < width; ++k) row[k] = Number::load(from[k]) * by;
    for (int64_t k = width; k < across; ++k) row[k] = 0.0f;
  }
}

template <class Number>
SCC_INLINE void narrow(const float* from, int64_t across, const float* by, int64_t by_step,
                       int64_t rows, int64_t width, void* data, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i, from += across, by += by_step) {
    const float* SCC_RESTRICT row = from;
    auto* SCC_RESTRICT to = row_of<Number>(data, i, stride);
    const float factor = *by;
    for (int64_t k = 0; k < width; ++k) to[k] = Number::store(row[k] * factor);
  }
}

#define SCC_DEFINE_ROWS(Number)                                                                 \
  SCC_CLONES void widen_##Number(const void* data, int64_t stride, int64_t rows, int64_t width, \
                                 float by, float* to, int64_t across) {                         \
    widen<Number>(data, stride, rows, width, by, to, across);                                   \
  }                                                                                             \
  SCC_CLONES void narrow_##Number(const float* from, int64_t across, const float* by,           \
                                  int64_t by_step, int64_t rows, int64_t width, void* data,     \
                                  int64_t stride) {                                             \
    narrow<Number>(from, across, by, by_step, rows, width, data, stride);                       \
  }

SCC_DEFINE_ROWS(Float32)
SCC_DEFINE_ROWS(Float16)
SCC_DEFINE_ROWS(BFloat16)

// 16 x 16 numbers: four times, the two halves of the rows are interleaved.
SCC_INLINE void transpose_tile(const float* from, int64_t from_row, float* to, int64_t to_row) {
#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SCC_SHUFFLES
#endif
#endif
#ifdef SCC_SHUFFLES
  Sixteen one[kLanes], two[kLanes];
  for (int i = 0; i < kLanes; ++i) load(from + i * from_row, one[i]);
#define SCC_INTERLEAVE(a, b)                                                                     \
  for (int i = 0; i < kLanes / 2; ++i) {                                                         \
    b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, \
                                       6, 22, 7, 23);                                            \
    b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, \
                                           13, 29, 14, 30, 15, 31);                              \
  }
  SCC_INTERLEAVE(one, two)
  SCC_INTERLEAVE(two, one)
  SCC_INTERLEAVE(one, two)
  SCC_INTERLEAVE(two, one)
#undef SCC_INTERLEAVE
  for (int i = 0; i < kLanes; ++i) memcpy(to + i * to_row, &one[i], sizeof(Sixteen));
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) to[j * to_row + i] = from[i * from_row + j];
  }
#endif
}

// Both sides are whole tiles.
SCC_CLONES void transpose(const float* from, int64_t rows, int64_t across, float* to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t k = 0; k < across; k += kLanes) {
      transpose_tile(from + i * across + k, across, to + k * rows + i, rows);
    }
  }
}

}  // namespace
}  // namespace scc_fast
