// Runs of random numbers on the CPU.
#pragma once

#include <cstdint>

namespace scc_fast {

// `count` numbers of a stream from block `block` on: element e is lane e % 4 of block e / 4.
void fill_uniform(float* out, int64_t count, int64_t seed, int64_t block, uint32_t view,
                  uint32_t purpose);
void fill_normal(float* out, int64_t count, int64_t seed, int64_t block, uint32_t view,
                 uint32_t purpose);

}  // namespace scc_fast
