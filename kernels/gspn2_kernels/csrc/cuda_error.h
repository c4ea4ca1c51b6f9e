// Errors of CUDA as texts.
#pragma once

#include <cuda_runtime.h>

namespace gspn2 {

// What went wrong, or nullptr.
inline const char* TextOf(cudaError_t error) {
  if (!error) return nullptr;
  cudaGetLastError();  // or the next call would be blamed for it
  return cudaGetErrorString(error);
}

}  // namespace gspn2
