// Who holds what, where it lies in shared memory, and the arithmetic of one position.
//
// A block of warps scans one direction of one image, for a block of channels. A warp holds a run of positions of a
// line for CL * V channels: its lanes are K positions x CL groups of V channels, and every lane keeps P adjacent
// positions in registers. Warps side by side share out the channels, or a line.
#pragma once

#include "line_scan_ptx.cuh"
#include "numbers.cuh"

namespace gspn2 {

extern __shared__ __align__(128) char shared_memory[];

constexpr int kLanes = 32;
constexpr int kChunk = 16;  // bytes of one asynchronous copy
constexpr int kBanks = 128;  // bytes that shared memory serves at once

template <typename T>
constexpr int kLogitSlot = sizeof(T) == 2 ? 8 : 16;  // bytes of three logits

// The sizes of a compiled kernel. `kStages` lines are in shared memory: one in use, the others under way.
template <typename T, int V, int CL, int P, int kStages_>
struct Tile {
  using Number = T;
  static constexpr int kVector = V, kChannelLanes = CL, kPositions = P, kStages = kStages_;
  static constexpr int kPositionLanes = kLanes / CL;
  static constexpr int kHeld = kPositionLanes * P;  // positions of a warp
  static constexpr int kChannels = CL * V;  // channels of a warp
  static constexpr int kVectorBytes = V * static_cast<int>(sizeof(T));
  static constexpr int kRowChunks = CL * kVectorBytes / kChunk;  // of a position in a warp's share of a tensor
  static constexpr int kPasses = (P * kVectorBytes + kChunk - 1) / kChunk;  // copies of a thread, line and tensor
  // Whether copies and weights may be left to warps of their own: the more so, the less the other warps have to do.
  static constexpr bool kMayBeHelped = kVectorBytes < kChunk;
  // Threads of a block at most: they share 65536 registers.
  static constexpr int kThreads = P <= 2 ? 512 : kVectorBytes < kChunk ? 1024 : P <= 4 ? 384 : 320;
  // Short lines are soon done: there, what counts is that all blocks of a large batch are resident.
  static constexpr int kResident = kVectorBytes == kChunk && P == 1 ? 2 : 1;
};

// Lines, positions of a line, and pixels between lines, between positions and before the first line of a scan.
struct Direction {
  int lines, positions, step, across, start;
};

__host__ __device__ inline Direction DirectionOf(int direction, int height, int width) {
  const bool vertical = direction < 2, backwards = direction % 2;
  Direction d;
  d.lines = vertical ? height : width;
  d.positions = vertical ? width : height;
  d.across = vertical ? 1 : width;
  const int step = vertical ? width : 1;
  d.step = backwards ? -step : step;
  d.start = backwards ? (d.lines - 1) * step : 0;
  return d;
}

// Offsets in shared memory. A stage holds a line of x, lam and u; y takes the place of u. In a tensor, positions follow
// each other, each with the channels of all warps: what lies side by side in global memory does so here. A copy of 128
// bytes is then one request to L2; to places further apart, it would be a request for every 32 bytes.
struct Layout {
  int held, chunks, turn_shift, turn_mask, tensor, stage;
  int weights, weight_buffer, logits, logit_stage, edges, edge_buffer, total;

  // Where a chunk of a position lies in a tensor. Lanes read positions that are P apart, from the same banks if chunks
  // kept their order in every 128 bytes: they are turned by a number that differs between these lanes.
  template <class Tile>
  __device__ int Place(int position, int chunk) const {
    const int at = position * chunks + chunk, turn = at / (kBanks / kChunk) >> turn_shift & turn_mask;
    return (at ^ turn * Tile::kRowChunks) * kChunk;
  }
};

template <class Tile>
Layout LayoutOf(int line_warps, int channel_warps, int groups) {
  Layout l;
  l.held = Tile::kHeld * line_warps;
  l.chunks = Tile::kRowChunks * channel_warps;
  // Of P and of the warps, how often 2 goes into their product: there are 1, 2 or 4 warps, and up to 5 positions.
  const int twos = (Tile::kPositions % 4 == 0 ? 2 : Tile::kPositions % 2 == 0) + channel_warps / 2;
  l.turn_shift = twos > 2 ? twos - 2 : 0;
  l.turn_mask = twos > 1 ? 3 : twos;
  l.tensor = (l.held * l.chunks * kChunk + kBanks - 1) / kBanks * kBanks;
  l.stage = 3 * l.tensor;
  l.weights = Tile::kStages * l.stage;
  l.weight_buffer = groups * l.held * static_cast<int>(sizeof(float4));
  l.logits = l.weights + 2 * l.weight_buffer;
  l.logit_stage = groups * l.held * kLogitSlot<typename Tile::Number>;
  l.edges = l.logits + Tile::kStages * l.logit_stage;
  // The first and the last states of each warp of a line, and of one more at each end, which stay 0. A warp that has
  // the line to itself needs but one row of zeros.
  const int row = channel_warps * Tile::kChannels * static_cast<int>(sizeof(float));
  l.edge_buffer = line_warps == 1 ? 0 : (line_warps + 2) * 2 * row;
  l.total = l.edges + (line_warps == 1 ? row : 2 * l.edge_buffer);
  return l;
}

// What a kernel is told. segment is the number of lines when a scan never restarts. Where `helped`, a block has twice
// the warps that its tiles need: the second half does what Copies and Weights do, the first half the rest.
struct Scan {
  const char *x, *lam, *logits, *u;
  char* y;
  int height, width, channels, groups, segment;
  int channel_blocks, line_warps, channel_warps, groups_held;
  bool helped;
  Layout layout;
};

// Weights of three neighbours, of which the first and the last may not exist: softmax of log(sigmoid).
//
// e = exp(-a), so that a weight is 1 / (1 + e) over the sum of these. Where all neighbours' logits are very low, all
// are raised alike: below -19 a sigmoid is exp(a) in fp32, so that nothing changes but that products stay finite.
// What is cut off then is a weight of 1e-10.
__device__ inline float4 Normalise(float a0, float a1, float a2, bool first, bool last) {
  constexpr float kLog2e = 1.4426950408889634f, kLow = 19.0f, kCut = 42.9f;
  const float least = fminf(fminf(first ? -a1 : -a0, last ? -a1 : -a2), -a1);
  const float raise = fmaxf(least - kLow, 0.0f);
  const float e0 = Exp2(kLog2e * MinOrNan(-a0 - raise, kCut));
  const float e1 = Exp2(kLog2e * MinOrNan(-a1 - raise, kCut));
  const float e2 = Exp2(kLog2e * MinOrNan(-a2 - raise, kCut));
  const float s0 = first ? 1.0f : 1.0f + e0, s1 = 1.0f + e1, s2 = last ? 1.0f : 1.0f + e2;
  // 1/s0 : 1/s1 : 1/s2 = s1 s2 : s0 s2 : s0 s1, with one division in all.
  const float w0 = first ? 0.0f : s1 * s2, w1 = s0 * s2, w2 = last ? 0.0f : s0 * s1;
  // Rounding errors of weights average out over many lines; that of a reciprocal might lean to one side.
  const float sum = w0 + w1 + w2, rough = Reciprocal(sum), scale = fmaf(rough, fmaf(-sum, rough, 1.0f), rough);
  return make_float4(w0 * scale, w1 * scale, w2 * scale, 0.0f);
}

}  // namespace gspn2
