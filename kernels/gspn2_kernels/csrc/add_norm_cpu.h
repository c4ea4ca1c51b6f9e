// AddNorm on a CPU.
#pragma once

#include "add_norm.h"
#include "parallel.h"

namespace gspn2 {

// All of one dtype, contiguous.
void AddNormCpu(const AddNorm& call, Dtype dtype, ParallelFor parallel_for, void* pool);

}  // namespace gspn2
