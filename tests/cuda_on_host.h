// As much of CUDA as the kernels of csrc/cuda/*.cuh need, on one host thread: blocks run one after
// the other, the threads of a block as coroutines that take turns where they wait for each other.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

static dim3 gridDim, blockDim, blockIdx, threadIdx;

template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) __builtin_trap();
  return *from;
}

struct __nv_bfloat16 {
  uint16_t bits;
};

// ---- The threads of a block ---------------------------------------------------------------------

struct Coroutine {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 15);
  bool done = false;
};

static ucontext_t scheduler;
static std::vector<std::unique_ptr<Coroutine>> threads;
static std::function<void()> body;
static unsigned arrived, generation;

inline void run_body() {
  body();
  threads[threadIdx.x]->done = true;
}

inline void add_thread() {
  Coroutine& thread = *threads.emplace_back(new Coroutine);
  getcontext(&thread.context);
  thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
  thread.context.uc_link = &scheduler;
  makecontext(&thread.context, run_body, 0);
}

inline void yield() { swapcontext(&threads[threadIdx.x]->context, &scheduler); }

inline void __syncthreads() {
  const unsigned mine = generation;
  if (++arrived == blockDim.x) arrived = 0, ++generation;
  while (generation == mine) yield();
}

// In each turn every thread runs to its next wait, so a warp's threads exchange in the same turn.
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static T slots[1024];
  slots[threadIdx.x] = value;
  yield();
  value = slots[threadIdx.x ^ distance];
  yield();
  return value;
}

// Runs call() as every thread of every block; `waits` says whether threads wait for each other.
inline void launch(dim3 grid, unsigned block, bool waits, std::function<void()> call) {
  gridDim = grid, blockDim = {block, 1}, body = call;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      if (!waits) {
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) call();
        continue;
      }
      threads.clear();
      arrived = 0;
      while (threads.size() < block) add_thread();
      for (bool busy = true; busy;) {
        busy = false;
        for (threadIdx.x = 0; threadIdx.x < block; ++threadIdx.x) {
          if (threads[threadIdx.x]->done) continue;
          busy = true;
          swapcontext(&scheduler, &threads[threadIdx.x]->context);
        }
      }
    }
  }
}

// ---- bfloat16 -----------------------------------------------------------------------------------

#include "cuda/vector.cuh"

inline float to_float(__nv_bfloat16 value) {
  return scc_fast::float_of(uint32_t{value.bits} << 16);
}

template <>
inline __nv_bfloat16 scc_fast::from_float<__nv_bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}
