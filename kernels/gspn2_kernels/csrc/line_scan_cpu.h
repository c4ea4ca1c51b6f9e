// The line scan on a CPU; kernels/README.md has its definition.
#pragma once

#include "line_scan.h"
#include "parallel.h"

namespace gspn2 {

// x (B,H,W,C), lam and u (B,H,W,4,C), logits (B,H,W,4,G,3), y (B,H,W,4,C), contiguous; the shape must be valid.
// Returns nullptr, or what went wrong.
const char* LineScanCpu(const Shape& shape, Dtype dtype, const void* x, const void* lam, const void* logits,
                        const void* u, void* y, ParallelFor parallel_for, void* pool);

}  // namespace gspn2
