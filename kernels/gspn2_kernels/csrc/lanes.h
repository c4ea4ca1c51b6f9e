// Eight numbers at a time, in the vectors of GCC and Clang: loads, stores, conversions of 16-bit numbers, an
// exponential. The compiler makes of them what the processor has; line_scan_task.h says why the namespace has a name
// of its own for each kind of processor.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define GSPN2_INLINE inline __attribute__((always_inline))

namespace gspn2 {

// The bits of 16-bit numbers.
struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

namespace GSPN2_PROCESSOR {

constexpr int64_t kLanes = 8;

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Shorts __attribute__((vector_size(16)));

template <class T>
struct Bits {
  using Vector = Shorts;
};

template <>
struct Bits<float> {
  using Vector = Floats;
};

GSPN2_INLINE Floats All(float value) { return value - Floats{}; }

GSPN2_INLINE Floats Widen(Floats value, float) { return value; }

GSPN2_INLINE Floats Widen(Shorts bits, Bfloat16) { return (Floats)(__builtin_convertvector(bits, Words) << 16); }

GSPN2_INLINE Floats Widen(Shorts bits, Half) {
#ifdef __F16C__
  return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
  const Words word = __builtin_convertvector(bits, Words);
  const Words shifted = (word & 0x7fffu) << 13;  // exponent and fraction lie where fp32 has them
  const Words exponent = shifted & 0x0f800000u;
  const Words normal = shifted + ((127u - 15u) << 23);
  const Words special = shifted | 0x7f800000u;  // infinity and NaN
  // A subnormal number is fraction * 2^-24: as the fraction of 2^-14, less 2^-14. No step of it is subnormal in
  // fp32, so it survives a processor that is told to flush those.
  const Words subnormal = (Words)((Floats)(shifted + (113u << 23)) - 6.103515625e-5f);
  const Words magnitude = exponent == 0 ? subnormal : exponent == 0x0f800000u ? special : normal;
  return (Floats)(magnitude | (word & 0x8000u) << 16);
#endif
}

GSPN2_INLINE Floats Narrow(Floats value, float) { return value; }

// To nearest, ties to even, as the next.
GSPN2_INLINE Shorts Narrow(Floats value, Bfloat16) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(value == value ? rounded : nan, Shorts);
}

GSPN2_INLINE Shorts Narrow(Floats value, Half) {
#ifdef __F16C__
  return (Shorts)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  const Words sign = (Words)value & 0x80000000u;
  const Words bits = (Words)value ^ sign;
  // Too large a number carries over into the exponent of infinity.
  const Words normal = (bits - ((127u - 15u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const Words special = (value == value) ? Words{} + 0x7c00u : Words{} + 0x7e00u;
  // The last bit of 0.5 is 2^-24, the unit of subnormal numbers: the addition rounds to it.
  const Words subnormal = (Words)((Floats)bits + 0.5f) - 0x3f000000u;
  const Words magnitude = bits >= (143u << 23) ? special : bits < (113u << 23) ? subnormal : normal;
  return __builtin_convertvector(magnitude | sign >> 16, Shorts);
#endif
}

template <class T>
GSPN2_INLINE Floats Load(const T* from) {
  typename Bits<T>::Vector bits;
  std::memcpy(&bits, from, sizeof bits);
  return Widen(bits, T{});
}

template <class T>
GSPN2_INLINE void Store(Floats value, T* to) {
  const typename Bits<T>::Vector bits = Narrow(value, T{});
  std::memcpy(to, &bits, sizeof bits);
}

// The same of fewer than kLanes numbers.
template <class T>
GSPN2_INLINE Floats Load(const T* from, int64_t count) {
  T some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return Load(some);
}

template <class T>
GSPN2_INLINE void Store(Floats value, T* to, int64_t count) {
  T some[kLanes];
  Store(value, some);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

// e^x to 2 units in the last place, x clamped to [-80, 80], whose powers and their inverses are normal numbers.
// NaN stays NaN: every comparison is false for it, and a product with it is NaN.
GSPN2_INLINE Floats Exp(Floats x) {
  x = x > 80.0f ? All(80.0f) : x;
  x = x < -80.0f ? All(-80.0f) : x;
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the lowest bits.
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats power = shifted - 12582912.0f;
  // ln 2 in two parts, the first short enough for an exact product.
  const Floats r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  Floats sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * (r * r) + r + 1.0f;
  return sum * (Floats)(((Words)shifted << 23) + (127u << 23));
}

}  // namespace GSPN2_PROCESSOR
}  // namespace gspn2
