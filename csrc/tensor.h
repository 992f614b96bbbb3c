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

#include <cstdint>

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
