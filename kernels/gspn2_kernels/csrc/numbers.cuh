// Vectors of numbers in a GPU's memory, and in its registers as fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gspn2 {

template <int kBytes>
struct Words {
  static constexpr int kCount = kBytes / 4;
  uint32_t word[kCount];

  __device__ static Words Read(const void* from) {
    Words w;
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 v = static_cast<const uint4*>(from)[i];
        w.word[4 * i] = v.x, w.word[4 * i + 1] = v.y, w.word[4 * i + 2] = v.z, w.word[4 * i + 3] = v.w;
      }
    } else if constexpr (kBytes == 8) {
      const uint2 v = *static_cast<const uint2*>(from);
      w.word[0] = v.x, w.word[1] = v.y;
    } else {
      w.word[0] = *static_cast<const uint32_t*>(from);
    }
    return w;
  }

  __device__ void Write(void* to) const {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i)
        static_cast<uint4*>(to)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
    } else if constexpr (kBytes == 8) {
      *static_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    } else {
      *static_cast<uint32_t*>(to) = word[0];
    }
  }
};

__device__ inline float2 Unpack(uint32_t w, __nv_bfloat16) {
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}

__device__ inline float2 Unpack(uint32_t w, __half) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(w))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(w >> 16))));
}

__device__ inline uint32_t Pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(v.x) | static_cast<uint32_t>(__bfloat16_as_ushort(v.y)) << 16;
}

__device__ inline uint32_t Pack(float low, float high, __half) {
  return __half_as_ushort(__float2half_rn(low)) | static_cast<uint32_t>(__half_as_ushort(__float2half_rn(high))) << 16;
}

// Number i of a vector in memory.
template <typename T, int kBytes>
__device__ inline float Get(const Words<kBytes>& w, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(w.word[i]);
  } else {
    const float2 pair = Unpack(w.word[i / 2], T());
    return i % 2 ? pair.y : pair.x;
  }
}

template <typename T, int V>
__device__ inline Words<V * sizeof(T)> ToWords(const float (&v)[V]) {
  Words<V * sizeof(T)> w;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) w.word[i] = __float_as_uint(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) w.word[i] = Pack(v[2 * i], v[2 * i + 1], T());
  }
  return w;
}

}  // namespace gspn2
