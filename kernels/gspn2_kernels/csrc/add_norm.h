// Shapes of one call of AddNorm, a sum and its LayerNorm, and the launch of its CUDA kernel.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace gspn2 {

// sum = x + update + bias, rounded once, and normed = (sum - mean) / sqrt(variance + epsilon) * scale + shift, the
// variance that of a population, over the channels of a row.
struct AddNorm {
  int64_t rows, channels;
  bool one_bias;  // bias is one number, else one for each channel
  float epsilon;
  const void *x, *update, *bias, *scale, *shift;
  void *sum, *normed;
};

#ifdef GSPN2_CUDA
// All of one dtype, contiguous, on the device of `stream`. Returns nullptr, or what went wrong.
const char* LaunchAddNorm(const AddNorm& call, Dtype dtype, void* stream);
#endif

}  // namespace gspn2
