#include "add_norm_cpu.h"

#include <algorithm>

#include "add_norm_task.h"
#include "processors.h"

namespace gspn2 {
namespace {

// A task is worth a thread's while from about so many numbers on.
constexpr int64_t kNumbers = 1 << 14;

using RunRows = void (*)(const AddNorm&, int64_t begin, int64_t end);

RunRows Fastest(Dtype dtype) {
#ifdef GSPN2_WITH_AVX2
  if (RunsAvx2()) {
    return dtype == Dtype::kFloat  ? avx2::AddNormFloat
           : dtype == Dtype::kHalf ? avx2::AddNormHalf
                                   : avx2::AddNormBfloat16;
  }
#endif
  return dtype == Dtype::kFloat  ? generic::AddNormFloat
         : dtype == Dtype::kHalf ? generic::AddNormHalf
                                 : generic::AddNormBfloat16;
}

struct Work {
  const AddNorm& call;
  RunRows run;
  int64_t rows;  // of a task
};

void Run(void* data, size_t number) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t begin = static_cast<int64_t>(number) * work.rows;
  work.run(work.call, begin, std::min(begin + work.rows, work.call.rows));
}

}  // namespace

void AddNormCpu(const AddNorm& call, Dtype dtype, ParallelFor parallel_for, void* pool) {
  if (call.rows == 0 || call.channels == 0) return;
  Work work{call, Fastest(dtype), std::max<int64_t>(1, kNumbers / call.channels)};
  parallel_for(pool, static_cast<size_t>((call.rows + work.rows - 1) / work.rows), Run, &work);
}

}  // namespace gspn2
