// Rows of AddNorm on a CPU.
#pragma once

#include "add_norm.h"

namespace gspn2 {

// The same code, compiled for several kinds of processors; see line_scan_task.h.
#define GSPN2_DECLARE(processor)                                             \
  namespace processor {                                                      \
  void AddNormFloat(const AddNorm& call, int64_t begin, int64_t end);        \
  void AddNormHalf(const AddNorm& call, int64_t begin, int64_t end);         \
  void AddNormBfloat16(const AddNorm& call, int64_t begin, int64_t end);     \
  }

GSPN2_DECLARE(generic)
#ifdef GSPN2_WITH_AVX2
GSPN2_DECLARE(avx2)
#endif
#undef GSPN2_DECLARE

}  // namespace gspn2
