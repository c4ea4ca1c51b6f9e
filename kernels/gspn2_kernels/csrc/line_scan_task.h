// A task of the line scan on a CPU: lines of one direction of one image, for a block of its channels.
#pragma once

#include <cstdint>

namespace gspn2 {

// A block is a part of one group, or some whole groups.
struct Block {
  int64_t positions;       // of a line, M
  int64_t channels;        // of this block
  int64_t groups;          // that these channels are of
  int64_t group_channels;  // of this block in each of these groups
};

// How far apart things lie, in numbers.
struct Strides {
  int64_t x, lam, logits;  // u and y lie as lam
};

struct ScanTask {
  Block block;
  int64_t begin, end;  // lines, counted in scan order; a scan starts at `begin`
  int64_t segment;     // lines after which it restarts, 0 for never
  Strides line, position;
  // Line 0 of the direction, its position 0, the first channel or group of the block.
  const void *x, *lam, *logits, *u;
  void* y;
};

// A group of fewer channels gets its weights written out for each channel: its loops would be too short for vectors.
constexpr int64_t kSmallGroup = 8;

// Arrays of weights have room for a multiple of this many.
constexpr int64_t kWeightRoom = 8;

// Memory of a task. A line of state is M + 2 positions of `channels` numbers, of which the first and the last are
// always zero. Weights lie position by position, in them group by group or, expanded, channel by channel.
struct Scratch {
  float* state[2];
  float* weights[3];   // of the three neighbours
  float* expanded[3];  // the same in groups of fewer channels than kSmallGroup, unless of one
};

// The same code, compiled for several kinds of processors: nothing in it may come from a header's inline function
// that is not inside a namespace of its own, or the linker might keep the copy that some processors cannot run.
#define GSPN2_DECLARE(processor)                                   \
  namespace processor {                                            \
  void RunFloat(const ScanTask& task, const Scratch& scratch);     \
  void RunHalf(const ScanTask& task, const Scratch& scratch);      \
  void RunBfloat16(const ScanTask& task, const Scratch& scratch);  \
  }

GSPN2_DECLARE(generic)
#ifdef GSPN2_WITH_AVX2
GSPN2_DECLARE(avx2)
#endif

}  // namespace gspn2
