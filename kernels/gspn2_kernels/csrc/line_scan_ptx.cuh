// Instructions of a GPU for which C++ has no words: asynchronous copies and fast functions. Copies carry no hints
// for L2 (.L2::cache_hint): with them an H100 stopped at an illegal instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gspn2 {

// Keeps a number in a register, where the compiler would rather compute it anew for every line.
__device__ inline void Keep(int& number) { asm volatile("" : "+r"(number)); }
__device__ inline void Keep(uint32_t& number) { asm volatile("" : "+r"(number)); }
__device__ inline void Keep(int64_t& number) { asm volatile("" : "+l"(number)); }

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies of 4 or 8 bytes, through L1, or of 16, past it, if wanted. The condition is inside: around it, the compiler
// would branch for every copy.
template <int kBytes>
__device__ inline void CopyAsync(bool wanted, uint32_t shared, int64_t global) {
  if constexpr (kBytes == 16)
    asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16;}" ::"r"(+wanted),
                 "r"(shared), "l"(global)
                 : "memory");
  else
    asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.ca.shared.global [%1], [%2], %3;}" ::"r"(+wanted),
                 "r"(shared), "l"(global), "n"(kBytes)
                 : "memory");
}

__device__ inline void CopyAsync16(bool wanted, void* shared, const void* global) {
  CopyAsync<16>(wanted, SharedAddress(shared), reinterpret_cast<int64_t>(global));
}

// Copies words that lie side by side, through L1.
template <int kWords>
__device__ inline void CopyWordsAsync(bool wanted, void* shared, const void* global) {
  static_assert(kWords == 2 || kWords == 3);
  if constexpr (kWords == 2)
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.ca.shared.global [%1], [%2], 4;"
        "@p cp.async.ca.shared.global [%1+4], [%2+4], 4;}" ::"r"(+wanted),
        "r"(SharedAddress(shared)), "l"(global)
        : "memory");
  else
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.ca.shared.global [%1], [%2], 4;"
        "@p cp.async.ca.shared.global [%1+4], [%2+4], 4; @p cp.async.ca.shared.global [%1+8], [%2+8], 4;}" ::"r"(
            +wanted),
        "r"(SharedAddress(shared)), "l"(global)
        : "memory");
}

__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last `kPending` groups of this thread's copies are there.
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void Store16(bool wanted, void* global, uint4 v) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(+wanted), "l"(global),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}

__device__ inline void StoreWords(bool wanted, void* global, const uint32_t (&w)[2]) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}" ::"r"(+wanted), "l"(global),
               "r"(w[0]), "r"(w[1])
               : "memory");
}

__device__ inline void StoreWords(bool wanted, void* global, const uint32_t (&w)[4]) {
  Store16(wanted, global, make_uint4(w[0], w[1], w[2], w[3]));
}

__device__ inline float Exp2(float a) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

__device__ inline float Reciprocal(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// Unlike fminf, which drops a NaN.
__device__ inline float MinOrNan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace gspn2
