// Vector loads and stores, conversion, and whole division. No torch header; without nvcc,
// tests/cuda_on_host.h stands in for CUDA.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "pixel_math.h"

namespace scc_fast {

// ---- Conversion, to the nearest, ties to even ---------------------------------------------------

__device__ __forceinline__ float to_float(float value) { return value; }

template <typename T>
__device__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

#ifdef __CUDACC__
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
#endif

// ---- N elements at once, at an address that is a multiple of their size -------------------------

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

template <int N, typename T>
__device__ __forceinline__ void unpack(typename Word<N * sizeof(T)>::type word, float* values) {
  T lanes[N];
  memcpy(static_cast<void*>(lanes), &word, sizeof word);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(lanes[i]);
}

// Of memory that nothing writes while the kernel runs.
template <int N, typename T>
__device__ __forceinline__ void load_constant(const T* from, float* values) {
  using W = typename Word<N * sizeof(T)>::type;
  unpack<N, T>(__ldg(reinterpret_cast<const W*>(from)), values);
}

template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float* values) {
  using W = typename Word<N * sizeof(T)>::type;
  unpack<N, T>(*reinterpret_cast<const W*>(from), values);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float* values) {
  using W = typename Word<N * sizeof(T)>::type;
  T lanes[N];
#pragma unroll
  for (int i = 0; i < N; ++i) lanes[i] = from_float<T>(values[i]);
  W word;
  memcpy(&word, static_cast<const void*>(lanes), sizeof word);
  *reinterpret_cast<W*>(to) = word;
}

// Indices are constants once unrolled, so the values stay in registers.
template <int kStep, int N>
__device__ __forceinline__ void shift_down(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N - kStep; ++i) values[i] = values[i + kStep];
}

// `V` consecutive values from `start`, any integer, of a row that is read in aligned chunks of `G`,
// in two parts, so that a kernel can ask for all that it reads before it waits for any. In the
// first, chunk(column, values) reads those at a multiple of G: of a row of whole chunks nothing is
// read past its ends. In the second, what lags is dropped; the lag is the same for all threads.
template <int V, int G, typename Chunk>
__device__ __forceinline__ void read_chunks(int start, const Chunk& chunk, float (&wide)[V + G]) {
  const int lag = start & (G - 1);  // G is a power of two, so this holds below zero too
#pragma unroll
  for (int i = 0; i < V + G; i += G) {
    if (i < V || lag != 0) chunk(start - lag + i, wide + i);
  }
}

// The same of a row in memory, with `outside` past its ends.
template <int V, int G, typename T>
__device__ __forceinline__ void read_row(const T* __restrict__ row, int start, int width,
                                         float outside, float (&wide)[V + G]) {
  if (start >= 0 && start + V <= width) {  // most are: one comparison, one address
    const T* from = row + (start & -G);
    read_chunks<V, G>(
        start & (G - 1),
        [&](int column, float* values) { load_constant<G>(from + column, values); }, wide);
    return;
  }
#pragma unroll
  for (int i = 0; i < V + G; ++i) wide[i] = outside;
  read_chunks<V, G>(
      start,
      [&](int column, float* values) {
        if (column >= 0 && column < width) load_constant<G>(row + column, values);
      },
      wide);
}

template <int V, int G>
__device__ __forceinline__ void drop_lag(int start, bool reversed, float (&wide)[V + G],
                                         float* values) {
  static_assert(G <= 4, "a lag has two bits");
  if (G > 1 && start & 1) shift_down<1>(wide);
  if (G > 2 && start & 2) shift_down<2>(wide);
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = reversed ? wide[V - 1 - i] : wide[i];
}

// ---- Division by a number that all threads share ------------------------------------------------

// Exact for dividends below 2^31 and divisors from 1 to 2^31 (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994).
struct Divisor {
  uint32_t value, magic, shift;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - value;
    magic = static_cast<uint32_t>((excess << 32) / value + 1);
  }
};

SCC_HOST_DEVICE uint32_t operator/(uint32_t dividend, const Divisor& divisor) {
  const auto high = static_cast<uint32_t>((uint64_t{dividend} * divisor.magic) >> 32);
  return (high + dividend) >> divisor.shift;
}

}  // namespace scc_fast
