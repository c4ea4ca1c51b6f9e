// Which of the codes that are compiled for several kinds of processors this one can run.
#pragma once

namespace gspn2 {

#ifdef GSPN2_WITH_AVX2
inline bool RunsAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

}  // namespace gspn2
