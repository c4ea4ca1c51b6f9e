// AddNorm on a GPU: a warp for each row, which it reads once and keeps in registers.
#include "add_norm.h"

#include <climits>

#include "cuda_error.h"
#include "numbers.cuh"

#ifdef GSPN2_CUDA
namespace gspn2 {
namespace {

constexpr int kWarps = 8;

__device__ float SumOfWarp(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// A lane holds N vectors of 16 bytes: rows are at most 32 N of them long.
template <typename T, int N>
__global__ void __launch_bounds__(32 * kWarps) AddNormKernel(const __grid_constant__ AddNorm call) {
  constexpr int V = 16 / sizeof(T);
  using Vector = Words<16>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= call.rows) return;
  const int channels = static_cast<int>(call.channels), lane = threadIdx.x % 32;
  const T* const x = static_cast<const T*>(call.x) + row * channels;
  const T* const update = static_cast<const T*>(call.update) + row * channels;
  const float one_bias = static_cast<float>(*static_cast<const T*>(call.bias));
  T* const sum = static_cast<T*>(call.sum) + row * channels;
  T* const normed = static_cast<T*>(call.normed) + row * channels;
  float values[N][V];
  float total = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int c = (n * 32 + lane) * V;
    if (c < channels) {
      const Vector a = Vector::Read(x + c), b = Vector::Read(update + c);
#pragma unroll
      for (int v = 0; v < V; ++v) values[n][v] = Get<T>(b, v);
      if (call.one_bias) {
#pragma unroll
        for (int v = 0; v < V; ++v) values[n][v] += one_bias;
      } else {
        const Vector bias = Vector::Read(static_cast<const T*>(call.bias) + c);
#pragma unroll
        for (int v = 0; v < V; ++v) values[n][v] += Get<T>(bias, v);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) values[n][v] += Get<T>(a, v);
      // Everything else is computed from the sum as it is handed on.
      const Vector rounded = ToWords<T>(values[n]);
      rounded.Write(sum + c);
#pragma unroll
      for (int v = 0; v < V; ++v) total += values[n][v] = Get<T>(rounded, v);
    }
  }
  const float mean = SumOfWarp(total) / channels;
  float squares = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if ((n * 32 + lane) * V < channels) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[n][v] -= mean;
        squares = fmaf(values[n][v], values[n][v], squares);
      }
    }
  }
  const float factor = rsqrtf(SumOfWarp(squares) / channels + call.epsilon);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int c = (n * 32 + lane) * V;
    if (c < channels) {
      const Vector scale = Vector::Read(static_cast<const T*>(call.scale) + c);
      const Vector shift = Vector::Read(static_cast<const T*>(call.shift) + c);
#pragma unroll
      for (int v = 0; v < V; ++v) values[n][v] = fmaf(values[n][v] * factor, Get<T>(scale, v), Get<T>(shift, v));
      ToWords<T>(values[n]).Write(normed + c);
    }
  }
}

// Numbers one by one, the sum read again from memory: right for any alignment and any number of channels, such as the
// more than 1024 of fp32 that AddNormKernel cannot hold in registers.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) PlainAddNormKernel(const __grid_constant__ AddNorm call) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= call.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t channels = call.channels;
  const T* const x = static_cast<const T*>(call.x) + row * channels;
  const T* const update = static_cast<const T*>(call.update) + row * channels;
  const T* const bias = static_cast<const T*>(call.bias);
  T* const sum = static_cast<T*>(call.sum) + row * channels;
  T* const normed = static_cast<T*>(call.normed) + row * channels;
  float total = 0;
  for (int64_t c = lane; c < channels; c += 32) {
    const float of_update = static_cast<float>(update[c]) + static_cast<float>(bias[call.one_bias ? 0 : c]);
    sum[c] = static_cast<T>(static_cast<float>(x[c]) + of_update);
    total += static_cast<float>(sum[c]);
  }
  const float mean = SumOfWarp(total) / channels;
  float squares = 0;
  for (int64_t c = lane; c < channels; c += 32) {
    const float deviation = static_cast<float>(sum[c]) - mean;
    squares = fmaf(deviation, deviation, squares);
  }
  const float factor = rsqrtf(SumOfWarp(squares) / channels + call.epsilon);
  for (int64_t c = lane; c < channels; c += 32) {
    const float scale = static_cast<float>(static_cast<const T*>(call.scale)[c]);
    const float shift = static_cast<float>(static_cast<const T*>(call.shift)[c]);
    normed[c] = static_cast<T>(fmaf((static_cast<float>(sum[c]) - mean) * factor, scale, shift));
  }
}

template <typename T>
const void* Choose(const AddNorm& call) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool whole = call.channels % kVector == 0 && aligned(call.x) && aligned(call.update) && aligned(call.scale) &&
                     aligned(call.shift) && aligned(call.sum) && aligned(call.normed) &&
                     (call.one_bias || aligned(call.bias));
  const auto plain = reinterpret_cast<const void*>(&PlainAddNormKernel<T>);
  if (!whole) return plain;
  switch ((call.channels / kVector + 31) / 32) {
    case 1: return reinterpret_cast<const void*>(&AddNormKernel<T, 1>);
    case 2: return reinterpret_cast<const void*>(&AddNormKernel<T, 2>);
    case 3: return reinterpret_cast<const void*>(&AddNormKernel<T, 3>);
    case 4: return reinterpret_cast<const void*>(&AddNormKernel<T, 4>);
    case 5:
    case 6: return reinterpret_cast<const void*>(&AddNormKernel<T, 6>);
    case 7:
    case 8: return reinterpret_cast<const void*>(&AddNormKernel<T, 8>);
    default: return plain;
  }
}

}  // namespace

const char* LaunchAddNorm(const AddNorm& call, Dtype dtype, void* stream) {
  if (call.rows == 0 || call.channels == 0) return nullptr;
  const int64_t blocks = (call.rows + kWarps - 1) / kWarps;
  if (blocks > INT_MAX) return "too many rows for one launch";
  const void* const kernel = dtype == Dtype::kFloat  ? Choose<float>(call)
                             : dtype == Dtype::kHalf ? Choose<__half>(call)
                                                     : Choose<__nv_bfloat16>(call);
  AddNorm argument = call;
  void* arguments[] = {&argument};
  return TextOf(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps), arguments, 0,
                                 static_cast<cudaStream_t>(stream)));
}

}  // namespace gspn2
#endif  // GSPN2_CUDA
