// What the heads share on the CPU: features as rows, and their products with the texts.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cpu/simd.h"
#include "pixel_math.h"
#include "tensor.h"

namespace scc_fast {

constexpr float kTiny = 1e-12f;                     // F.normalize divides by no less
constexpr float kNoCosine = -2.0f;                  // below every cosine
constexpr int64_t kChunkBytes = int64_t{16} << 20;  // of cosines that are held at a time

inline float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

// Features of L views of B images.
struct Features {
  int64_t views, batch, width;
  Tensor tensor;  // [L, B, D], contiguous

  int64_t rows() const { return views * batch; }
  ScalarType type() const { return tensor.scalar_type(); }
  template <class Number>
  SCC_INLINE const typename Number::Stored* row(int64_t view, int64_t image) const {
    return static_cast<const typename Number::Stored*>(tensor.const_data_ptr()) +
           (view * batch + image) * width;
  }
  // Rows that a thread takes at least.
  int64_t grain() const { return 1 + 4096 / width; }
  // Images are worked through in chunks whose cosines stay below kChunkBytes.
  int64_t chunk(int64_t classes) const {
    return std::max<int64_t>(1, kChunkBytes / (4 * views * classes));
  }
};

inline Features read_features(const char* op, const Tensor& features) {
  const ScalarType type = features.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
        "features must be float32, float16 or bfloat16");
  check(features.is_cpu(), op, "features must be a CPU tensor");
  check(features.dim() == 3 && features.size(0) >= 1 && features.size(2) >= 1, op,
        "features must be (L, B, D) with L and D >= 1");
  return {features.size(0), features.size(1), features.size(2),
          torch::stable::contiguous(features)};
}

inline Tensor read_text(const char* op, const Tensor& text, const Features& features) {
  check(text.scalar_type() == ScalarType::Float && text.is_cpu(), op,
        "text must be a float32 CPU tensor");
  check(text.dim() == 2 && text.size(0) >= 1 && text.size(1) == features.width, op,
        "text must be (U, D) with U >= 1");
  // Detached: the product below would build a graph for a text that requires grad.
  std::array<StableIValue, 1> stack{torch::stable::detail::from(text)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

// Products of at least so many multiplications go to oneDNN, which keeps a plan for each shape it
// has met: not worth it for the small ones, of which a service may meet many.
constexpr int64_t kOneDnnFrom = int64_t{1} << 23;

// a [M, N], b [K, N] -> a b^T [M, K], float32. On x86-64 torch's oneDNN is asked by name: torch's
// own choice there, MKL, is half as fast on AMD processors (benchmarks/NOTES.md).
inline Tensor product_transposed(const Tensor& a, const Tensor& b) {
#if defined(__x86_64__) && defined(__linux__)
  if (a.size(0) * a.size(1) * b.size(0) >= kOneDnnFrom) {
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack{from(a),
                                      from(b),
                                      from(std::nullopt),
                                      from(std::string("none")),
                                      from(std::vector<double>{}),
                                      from(std::nullopt)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
#endif
  return torch::stable::matmul(a, torch::stable::transpose(b, 0, 1));
}

template <class Number>
SCC_INLINE float length(const typename Number::Stored* SCC_RESTRICT row, int64_t width) {
  return sqrtf(in_lanes(width, 0.0f, [&](float& sum, int64_t i) {
                 const float value = Number::load(row[i]);
                 sum += value * value;
               }).sum());
}

SCC_INLINE float largest(const float* SCC_RESTRICT row, int64_t count) {
  return in_lanes(count, row[0],
                  [&](float& most, int64_t i) { most = row[i] > most ? row[i] : most; })
      .max();
}

// Index 0 where there is none, as in a row of NaN.
SCC_INLINE int64_t first_equal(const float* SCC_RESTRICT row, int64_t count, float value) {
  for (int64_t index = 0; index < count; ++index) {
    if (row[index] == value) return index;
  }
  return 0;
}

}  // namespace scc_fast
