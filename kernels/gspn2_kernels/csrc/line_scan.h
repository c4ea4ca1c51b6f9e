// Shapes of one call of the line scan, and the launch of its CUDA kernel.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace gspn2 {

// segment is 0 for one scan over the whole grid, else the number of lines after which a scan restarts.
struct Shape {
  int64_t batch, height, width, channels, groups, segment;
};

#ifdef GSPN2_CUDA
// x (B,H,W,C), lam and u (B,H,W,4,C), logits (B,H,W,4,G,3), y (B,H,W,4,C), contiguous, on the device of `stream`.
// Returns nullptr, or what went wrong.
const char* LaunchLineScan(const Shape& shape, Dtype dtype, const void* x, const void* lam, const void* logits,
                           const void* u, void* y, void* stream);
#endif

}  // namespace gspn2
