// What every op needs of torch's stable ABI: checks, the result, and on CUDA the launch context.
//
// Python validates what users pass (scc_fast/ops); the checks here only keep the kernels'
// invariants.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace scc_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool holds, const char* op, const char* rule) {
  STD_TORCH_CHECK(holds, op, ": ", rule);
}

inline void check_stream(const char* op, int64_t purpose, int64_t view, int64_t numel) {
  check(purpose >= 0 && purpose <= UINT32_MAX, op, "purpose must be in [0, 2^32)");
  check(view >= 0 && view <= UINT32_MAX, op, "view must be in [0, 2^32)");
  check(numel >= 0, op, "numel must be >= 0");
}

// NaN is refused as well.
inline void check_not_negative(const char* op, const char* rule,
                               std::initializer_list<double> all) {
  for (const double value : all) check(value >= 0.0 && value < HUGE_VAL, op, rule);
}

inline void check_noise(const char* op, const std::vector<double>& noise) {
  for (const double sigma : noise) {
    check_not_negative(op, "noise must be finite numbers >= 0", {sigma});
  }
}

#ifdef __CUDACC__
// Makes the tensor's device current for a scope and holds torch's current stream on it.
struct LaunchContext {
  explicit LaunchContext(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* pointer = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &pointer));
    stream = static_cast<cudaStream_t>(pointer);
  }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

// Blocks for a grid-stride loop over `items`: enough to fill any GPU, never past a grid dimension.
inline unsigned grid_size(int64_t items, int64_t threads, int64_t most = 65535) {
  const int64_t blocks = (items + threads - 1) / threads;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}
#endif

}  // namespace scc_fast
