// attention and attention_back on the CPU, for short sequences: one head's scores stay in the
// cache. They are kept transposed, [key, query], so that maxima and sums over keys are sums of
// vectors, and padded queries trouble nobody.
#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "cpu/tiles.h"

namespace scc_fast {
namespace {

constexpr int64_t kBlock = kWide * kLanes;  // queries at a time
constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e43p-1f;

// ---- Softmax over keys --------------------------------------------------------------------------

// 2^(score - most), their sum and the logarithm of the sum of e^score, of 16 `vectors` queries.
SCC_CLONES void weigh(float* SCC_RESTRICT score, int64_t keys, int64_t vectors,
                      float* SCC_RESTRICT most, float* SCC_RESTRICT sum, float* SCC_RESTRICT lse) {
  const int64_t width = vectors * kLanes;
  for (int64_t i = 0; i < width; ++i) {
    most[i] = -HUGE_VALF;
    sum[i] = 0.0f;
  }
  for (int64_t j = 0; j < keys; ++j) {
    const float* SCC_RESTRICT row = score + j * width;
    for (int64_t i = 0; i < width; ++i) most[i] = row[i] > most[i] ? row[i] : most[i];
  }
  for (int64_t j = 0; j < keys; ++j) {
    float* SCC_RESTRICT row = score + j * width;
    for (int64_t i = 0; i < width; ++i) {
      const float power = exp2_nonpositive(row[i] - most[i]);
      row[i] = power;
      sum[i] += power;
    }
  }
  for (int64_t i = 0; i < width; ++i) {  // the sum is >= 1 or NaN
    const float total = sum[i] >= 1.0f ? most[i] * kLn2 + log_positive(sum[i]) : sum[i];
    lse[i] = total;
    sum[i] = 1.0f / sum[i];
  }
}

// Scores become weights, and their gradients those of the scores before the scale. The weights are
// divided by their sum: lse is rounded, and what they are off by would not cancel in the mean.
SCC_CLONES void slope(float* SCC_RESTRICT score, float* SCC_RESTRICT gradient, int64_t keys,
                      int64_t vectors, const float* SCC_RESTRICT log2, float* SCC_RESTRICT sum,
                      float* SCC_RESTRICT mean) {
  const int64_t width = vectors * kLanes;
  for (int64_t i = 0; i < width; ++i) sum[i] = mean[i] = 0.0f;
  for (int64_t j = 0; j < keys; ++j) {
    float* SCC_RESTRICT row = score + j * width;
    const float* SCC_RESTRICT by = gradient + j * width;
    for (int64_t i = 0; i < width; ++i) {
      const float weight = exp2_nonpositive(row[i] - log2[i]);
      row[i] = weight;
      sum[i] += weight;
      mean[i] += weight * by[i];
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    sum[i] = 1.0f / sum[i];
    mean[i] *= sum[i];
  }
  for (int64_t j = 0; j < keys; ++j) {
    float* SCC_RESTRICT row = score + j * width;
    float* SCC_RESTRICT to = gradient + j * width;
    for (int64_t i = 0; i < width; ++i) {
      const float weight = row[i] * sum[i];
      row[i] = weight;
      to[i] = weight * (to[i] - mean[i]);
    }
  }
}

// ---- Tasks --------------------------------------------------------------------------------------

using Widen = void (*)(const void*, int64_t, int64_t, int64_t, float, float*, int64_t);
using Narrow = void (*)(const float*, int64_t, const float*, int64_t, int64_t, int64_t, void*,
                        int64_t);

// A [B, H, T, d] tensor of which a row's numbers lie side by side.
struct Heads {
  Tensor tensor;

  Heads(const Tensor& given)
      : tensor(given.stride(3) == 1 || given.size(3) == 1 ? given
                                                          : torch::stable::contiguous(given)) {}
  int64_t stride() const { return tensor.stride(2); }
  const char* head(int64_t index, int64_t size) const {
    const int64_t heads = tensor.size(1);
    const int64_t offset = index / heads * tensor.stride(0) + index % heads * tensor.stride(1);
    return static_cast<const char*>(tensor.const_data_ptr()) + offset * size;
  }
};

// What results have: [B, T, H, d], contiguous.
struct Result {
  char* data;
  int64_t tokens, heads, width, size;

  int64_t stride() const { return heads * width; }
  char* head(int64_t index, int64_t token) const {
    return data + ((index / heads * tokens + token) * heads + index % heads) * width * size;
  }
};

struct Shape {
  int64_t heads, queries, keys, width;  // heads: of all images
  int64_t across, blocks;
  int64_t size;  // bytes of a number
  float scale;
  bool single;
  Widen widen;
  Narrow narrow;

  Shape(const Tensor& q, const Tensor& k)
      : heads(q.size(0) * q.size(1)), queries(q.size(2)), keys(k.size(2)), width(q.size(3)) {
    const ScalarType type = q.scalar_type();
    single = type == ScalarType::Float;
    size = single ? 4 : 2;
    widen = single ? widen_Float32 : type == ScalarType::Half ? widen_Float16 : widen_BFloat16;
    narrow = single ? narrow_Float32 : type == ScalarType::Half ? narrow_Float16 : narrow_BFloat16;
    scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)));
    across = padded(width);
    blocks = (queries + kBlock - 1) / kBlock;
  }
  // The first query of a block: they have whole vectors, as many as each other or one more.
  int64_t first(int64_t block) const {
    return std::min(queries, padded(queries) / kLanes * block / blocks * kLanes);
  }
  int64_t count(int64_t block) const { return first(block + 1) - first(block); }
  // Tasks that a thread takes at least.
  int64_t grain(int64_t rows) const { return 1 + 100000 / (rows * keys * width + 1); }
};

// Pieces of a buffer that the thread keeps, each on a cache line's bounds.
class Scratch {
 public:
  explicit Scratch(std::initializer_list<int64_t> sizes) {
    static thread_local std::vector<float> kept;
    int64_t all = kLanes;
    for (const int64_t size : sizes) all += padded(size);
    if (static_cast<int64_t>(kept.size()) < all) kept = std::vector<float>(all);
    const auto address = reinterpret_cast<uintptr_t>(kept.data());
    next_ = kept.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* take(int64_t size) {
    float* piece = next_;
    next_ += padded(size);
    return piece;
  }

 private:
  float* next_;
};

struct Forward : Shape {
  Heads q, k, v;
  Result o;
  float* lse;  // [B, H, Tq]

  void tasks(int64_t begin, int64_t end) const {
    const int64_t value_size = keys * across, query_size = kBlock * across;
    Scratch scratch(
        {value_size, single ? 0 : value_size, query_size, query_size, keys * kBlock, 3 * kBlock});
    float* const values = scratch.take(value_size);
    float* const wide_keys = scratch.take(single ? 0 : value_size);
    float* const rows = scratch.take(query_size);  // of queries, then of the result
    float* const columns = scratch.take(query_size);
    float* const scores = scratch.take(keys * kBlock);
    float* const most_of = scratch.take(3 * kBlock);
    float *const sum = most_of + kBlock, *const total = sum + kBlock;
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / blocks, block = task % blocks;
      const int64_t from = first(block), wanted = count(block), columns_of = padded(wanted);
      const char* key = k.head(head, size);
      if (head != held) {
        widen(v.head(head, size), v.stride(), keys, width, 1.0f, values, across);
        if (!single) widen(key, k.stride(), keys, width, 1.0f, wide_keys, across);
        held = head;
      }
      widen(q.head(head, size) + from * q.stride() * size, q.stride(), wanted, width,
            scale * kLog2E, rows, across);
      std::fill(rows + wanted * across, rows + columns_of * across, 0.0f);
      transpose(rows, columns_of, across, columns);
      const float* left = single ? reinterpret_cast<const float*>(key) : wide_keys;
      product({keys, width, columns_of / kLanes, left, single ? k.stride() : across, 1, columns,
               columns_of, scores, columns_of, false});
      weigh(scores, keys, columns_of / kLanes, most_of, sum, total);
      std::copy(total, total + wanted, lse + head * queries + from);
      product({wanted, keys, across / kLanes, scores, 1, columns_of, values, across, rows, across,
               false});
      narrow(rows, across, sum, 1, wanted, width, o.head(head, from), o.stride());
    }
  }
};

struct Backward : Shape {
  Heads gradient, q, k, v;
  const float* lse;  // [B, H, Tq]
  Result dq, dk, dv;

  void tasks(int64_t begin, int64_t end) const {
    const int64_t whole = keys * across, part = kBlock * across, square = keys * kBlock;
    const int64_t more = single ? 0 : whole;
    Scratch scratch(
        {whole, whole, whole, more, part, part, part, part, square, square, 3 * kBlock});
    float *const key_rows = scratch.take(whole), *const value_rows = scratch.take(more);
    float *const key_slopes = scratch.take(whole), *const value_slopes = scratch.take(whole);
    float *const rows = scratch.take(part), *const columns = scratch.take(part);
    float *const slope_rows = scratch.take(part), *const slope_columns = scratch.take(part);
    float *const weights = scratch.take(square), *const slopes = scratch.take(square);
    float *const log2 = scratch.take(3 * kBlock), *const sum = log2 + kBlock;
    float* const mean = sum + kBlock;
    const float one = 1.0f, ln2 = kLn2;
    for (int64_t head = begin; head < end; ++head) {
      const char *key = k.head(head, size), *value = v.head(head, size);
      widen(key, k.stride(), keys, width, 1.0f, key_rows, across);
      if (!single) widen(value, v.stride(), keys, width, 1.0f, value_rows, across);
      const float* left = single ? reinterpret_cast<const float*>(value) : value_rows;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = first(block), wanted = count(block), columns_of = padded(wanted);
        const int64_t vectors = columns_of / kLanes, wide = across / kLanes;
        fetch(q, head, from, wanted, scale * kLog2E, rows, columns);
        fetch(gradient, head, from, wanted, 1.0f, slope_rows, slope_columns);
        for (int64_t i = 0; i < columns_of; ++i) {
          log2[i] = i < wanted ? lse[head * queries + from + i] * kLog2E : 0.0f;
        }
        product({keys, width, vectors, key_rows, across, 1, columns, columns_of, weights,
                 columns_of, false});
        product({keys, width, vectors, left, single ? v.stride() : across, 1, slope_columns,
                 columns_of, slopes, columns_of, false});
        slope(weights, slopes, keys, vectors, log2, sum, mean);
        product({keys, wanted, wide, weights, columns_of, 1, slope_rows, across, value_slopes,
                 across, block > 0});
        product({keys, wanted, wide, slopes, columns_of, 1, rows, across, key_slopes, across,
                 block > 0});
        product({wanted, keys, wide, slopes, 1, columns_of, key_rows, across, rows, across, false});
        narrow(rows, across, &scale, 0, wanted, width, dq.head(head, from), dq.stride());
      }
      narrow(key_slopes, across, &ln2, 0, keys, width, dk.head(head, 0), dk.stride());
      narrow(value_slopes, across, &one, 0, keys, width, dv.head(head, 0), dv.stride());
    }
  }

  // A block of rows, and its transpose; what is beyond them is zero.
  void fetch(const Heads& given, int64_t head, int64_t from, int64_t wanted, float by, float* rows,
             float* columns) const {
    widen(given.head(head, size) + from * given.stride() * size, given.stride(), wanted, width, by,
          rows, across);
    std::fill(rows + wanted * across, rows + padded(wanted) * across, 0.0f);
    transpose(rows, padded(wanted), across, columns);
  }
};

// ---- Ops ----------------------------------------------------------------------------------------

Tensor empty_rows(const Tensor& like) {  // [B, H, T, d] -> [B, T, H, d]
  return torch::stable::new_empty(like, {like.size(0), like.size(2), like.size(1), like.size(3)});
}

Result result(Tensor& rows, int64_t size) {
  return {static_cast<char*>(rows.mutable_data_ptr()), rows.size(1), rows.size(2), rows.size(3),
          size};
}

void check_heads(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  const ScalarType type = q.scalar_type();
  check(q.is_cpu() &&
            (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16),
        op, "q must be a CPU tensor of float32, float16 or bfloat16");
  check(q.dim() == 4 && q.size(3) >= 1, op, "q must be (B, H, Tq, d) with d >= 1");
  check(k.is_cpu() && k.scalar_type() == type && k.dim() == 4 && k.size(0) == q.size(0) &&
            k.size(1) == q.size(1) && k.size(3) == q.size(3),
        op, "k must be (B, H, Tk, d), like q");
  check(v.is_cpu() && v.scalar_type() == type && v.sizes().equals(k.sizes()), op,
        "v must be like k");
}

std::tuple<Tensor, Tensor> attention(const Tensor& q,    // [B, H, Tq, d]
                                     const Tensor& k,    // [B, H, Tk, d]
                                     const Tensor& v) {  // [B, H, Tk, d]
  check_heads("attention", q, k, v);
  Tensor o = empty_rows(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const Shape shape(q, k);
  if (!shape.keys) {
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -HUGE_VAL);
    return {o, lse};
  }
  const Forward forward{
      shape, q, k, v, result(o, shape.size), static_cast<float*>(lse.mutable_data_ptr())};
  torch::stable::parallel_for(0, shape.heads * shape.blocks, shape.grain(kBlock),
                              [&](int64_t begin, int64_t end) { forward.tasks(begin, end); });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_back(const Tensor& gradient,  // [B, H, Tq, d]
                                                  const Tensor& q,         // [B, H, Tq, d]
                                                  const Tensor& k,         // [B, H, Tk, d]
                                                  const Tensor& v,         // [B, H, Tk, d]
                                                  const Tensor& lse) {     // [B, H, Tq]
  const char* op = "attention_back";
  check_heads(op, q, k, v);
  check(gradient.is_cpu() && gradient.scalar_type() == q.scalar_type() &&
            gradient.sizes().equals(q.sizes()),
        op, "gradient must have the dtype, shape and device of q");
  check(lse.is_cpu() && lse.scalar_type() == ScalarType::Float && lse.dim() == 3 &&
            lse.size(0) == q.size(0) && lse.size(1) == q.size(1) && lse.size(2) == q.size(2),
        op, "lse must be (B, H, Tq) float32");
  Tensor dq = empty_rows(q), dk = empty_rows(k), dv = empty_rows(v);
  const Shape shape(q, k);
  if (!shape.keys || !shape.queries) {
    for (Tensor* each : {&dq, &dk, &dv}) torch::stable::zero_(*each);
    return {dq, dk, dv};
  }
  const Tensor sums = torch::stable::contiguous(lse);
  const Backward backward{shape,
                          gradient,
                          q,
                          k,
                          v,
                          static_cast<const float*>(sums.const_data_ptr()),
                          result(dq, shape.size),
                          result(dk, shape.size),
                          result(dv, shape.size)};
  torch::stable::parallel_for(0, shape.heads, shape.grain(shape.queries),
                              [&](int64_t begin, int64_t end) { backward.tasks(begin, end); });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace scc_fast

STABLE_TORCH_LIBRARY_IMPL(scc_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&scc_fast::attention));
  m.impl("attention_back", TORCH_BOX(&scc_fast::attention_back));
}
